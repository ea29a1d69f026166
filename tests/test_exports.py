"""What `import kvembed` offers, and what it costs."""

from __future__ import annotations

import subprocess
import sys

import kvembed


def test_the_public_names():
    assert kvembed.__all__ == sorted(kvembed.__all__, key=lambda name: (not name.isupper(), name.startswith("_"), name))
    assert set(kvembed.__all__) == {
        *("METHODS", "EmbedConfig", "Embedder", "Encoded", "Explanation", "Readout", "__version__"),
        *("InputError", "KvembedError", "ModelNotFound", "OutOfMemory", "UnsupportedModel"),
    }
    assert all(getattr(kvembed, name) is not None for name in kvembed.__all__)
    assert dir(kvembed) == kvembed.__all__ or set(dir(kvembed)) == set(kvembed.__all__)


def test_importing_the_package_or_the_command_line_does_not_import_torch():
    code = "import sys, kvembed, kvembed.cli; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_no_module_is_imported_by_one_it_imports():
    """No cycles: `python -c "import kvembed.X"` works for every module on its own."""
    names = ["attention", "backbone", "batching", "cli", "config", "embedder", "errors", "layers", "methods", "models"]
    names += ["plots", "pooling", "prompts", "files", "saved", "self_written", "transform", "tuning"]
    code = "; ".join(f"import kvembed.{name}" for name in reversed(names))
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
