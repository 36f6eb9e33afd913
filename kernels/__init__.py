"""Triton kernels and their eager references: one file an op, importable anywhere, run by Triton on CUDA only.

`kernels` is also the import name of a Hugging Face distribution that transformers asks for by `find_spec` and version.
Having no version attribute here, our package is never mistaken for it; having both installed, one hides the other, so that
is refused at once instead of failing somewhere inside transformers.
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
