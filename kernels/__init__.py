"""Triton kernels and their eager references, one file an op. They import anywhere; Triton runs them on CUDA only.

`kernels` is also the import name of a Hugging Face distribution, which transformers looks for by name and version. This package
has no version attribute, so it is never taken for that one. Where both are installed one hides the other: that is refused here,
in one line, instead of failing somewhere inside transformers.
"""

from importlib.metadata import PackageNotFoundError, version


def _refuse_namesake() -> None:
    try:
        namesake = version("kernels")
    except PackageNotFoundError:
        return
    raise ImportError(
        f"the Hugging Face distribution 'kernels' {namesake} and Vesalius both provide the package 'kernels', and {__file__} now "
        "shadows it; remove the distribution (pip uninstall kernels) or install Vesalius in an environment without it"
    )


_refuse_namesake()
