"""The import paths of AWS's data-parallel library, served by `smdistributed_rs`.

`smdistributed` itself has no `__init__.py`: AWS's model-parallel library lives under the same name.
"""

from importlib import metadata as _metadata

_REAL = "smdistributed-dataparallel"


def _refuse_the_real_one() -> None:
    """Both own the same files: whatever was installed last would have overwritten half of the other."""
    try:
        found = _metadata.version(_REAL)
    except _metadata.PackageNotFoundError:
        return
    raise ImportError(
        f"AWS's {_REAL} {found} and smdistributed-shim are both installed here, and both own "
        "'smdistributed.dataparallel': uninstall one, and install the other again "
        f"(pip uninstall {_REAL} smdistributed-shim; pip install smdistributed-shim)"
    )


_refuse_the_real_one()

__version__ = _metadata.version("smdistributed-shim")
