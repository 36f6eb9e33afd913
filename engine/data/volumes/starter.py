"""The volume of the run without flags: the first image of a real MR series of a head, which nibabel carries among its test data."""

from importlib.resources import as_file, files
from pathlib import Path

from engine.errors import InputError
from engine.files import cache_folder, write_whole

BOX = "ventricles=14:52,28,77,60"  # the front half of the lateral ventricles


def build_head() -> Path:
    """A NIfTI file of 24 axial slices of 96 x 128 pixels; made where it is missing. InputError without nibabel."""
    path = cache_folder() / "starter" / "head.nii.gz"
    if not path.exists():
        try:
            import nibabel
        except ImportError:
            raise InputError("the starter volume comes with nibabel: pip install 'vesalius[volumes]'") from None
        import gzip

        with as_file(files("nibabel.tests.data") / "example4d.nii.gz") as carried:
            first = nibabel.Nifti1Image.from_filename(carried).slicer[..., 0]
            write_whole(path, gzip.compress(first.to_bytes(), mtime=0))
    return path
