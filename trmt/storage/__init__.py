"""Files and folders that are written atomically, on local disks and in object stores; locks."""
