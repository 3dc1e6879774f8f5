"""What stands behind the web page of `smollm2.app`: the models it serves, and the gate that every request passes."""
