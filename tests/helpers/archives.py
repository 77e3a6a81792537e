"""Archives with given files, links and devices."""

import io
import stat
import tarfile
import zipfile


def write_tar(path, files, mode=0o644, **types):
    """Write a tar archive; a member named in `types` becomes a link or a device."""
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), mode
            tar.addfile(info, io.BytesIO(data))
        for name, (kind, linkname) in types.items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, linkname
            tar.addfile(info)
    return path


def write_zip(path, files, mode=stat.S_IFREG | 0o644):
    """Write a zip archive whose members have these permissions and this file type."""
    with zipfile.ZipFile(path, "w") as zipped:
        for name, data in files.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            zipped.writestr(info, data)
    return path
