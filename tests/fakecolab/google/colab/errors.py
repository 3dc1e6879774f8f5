class Error(Exception):
    pass


class RuntimeManagementError(Error):
    pass
