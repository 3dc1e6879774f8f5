import os


def upload_file(filename):
    raise ValueError("File has not been uploaded")


def upload(target_dir=""):
    return {}


def download(filename):
    if not os.path.exists(filename):
        raise FileNotFoundError(f"Cannot find file: {filename}")


def view(filepath):
    if not os.path.exists(filepath):
        raise FileNotFoundError(f"Cannot find file: {filepath}")
