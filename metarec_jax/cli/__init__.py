"""The command line, `metarec`."""

import os

from metarec_jax.cli.commands import cli

__all__ = ["cli", "main"]


def main() -> None:
    """Run the command line; errors of the package become one line each."""
    from metarec_jax.errors import DataError, ModelFileError, StoreError

    _keep_compiled_programs()
    try:
        cli(standalone_mode=True)
    except (DataError, ModelFileError, StoreError, ValueError, FloatingPointError, ImportError) as error:
        raise SystemExit(f"metarec: {error}") from error


def _keep_compiled_programs() -> None:
    """What was compiled once is read from the user's cache the next time, unless JAX was told of another one."""
    import jax

    from metarec_jax.data.fetch import cache_folder

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
