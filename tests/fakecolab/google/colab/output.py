def clear(wait=False, output_tags=()):
    """Clear the output of the cell."""


def eval_js(script, ignore_result=False, timeout_sec=None):
    if not ignore_result:
        raise RuntimeError("eval_js needs a browser")


def register_callback(function_name, callback):
    """Remember a Python function that the page may call."""


def no_vertical_scroll():
    """Let the output grow."""


def enable_custom_widget_manager(version="5.0.0a"):
    raise AssertionError("notebooks use core widgets only; nothing may load a widget manager from a CDN")


def serve_kernel_port_as_iframe(port, path="/", width="100%", height="400", cache_in_notebook=False):
    """Show a port of the kernel in the output."""


def serve_kernel_port_as_window(port, path="/", anchor_text=None, skip_warning=False):
    """Link to a port of the kernel."""
