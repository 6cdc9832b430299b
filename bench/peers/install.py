"""Installs the toolkits that trmt is compared with, each in an environment of its own beside one torch.

    python bench/peers/install.py FOLDER [--torch SITE_PACKAGES] [--fairseq CHECKOUT] [NAME...]

A line in a `.pth` file shows each environment the torch of `SITE_PACKAGES` (by default that of the Python
that runs this), so that torch is installed once and everyone computes with the same. fairseq has no release
for current Python: a checkout of its main branch is copied, repaired by the edits in `REPAIRS`, and its two
Cython modules are built.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

# Environment: what `pip install` is given, one line after the other. `--no-deps` where a toolkit pins an
# old torch that it does not need.
PACKAGES: dict[str, list[list[str]]] = {
    "joeynmt": [["joeynmt==2.3.0", "importlib_metadata", "sentencepiece==0.2.0"]],
    "eole": [["eole==0.6.4", "aiohttp"]],
    "opennmt": [
        ["--no-deps", "OpenNMT-py==3.5.1"],
        ["configargparse", "ctranslate2", "waitress", "pyonmttok", "pyyaml", "sacrebleu", "rapidfuzz"]
        + ["pyahocorasick", "six", "tensorboard", "flask", "pandas", "spacy", "fasttext-wheel"],
    ],
    "sockeye": [["--no-deps", "sockeye==3.1.34"], ["pyyaml", "numpy", "sacrebleu", "portalocker"]],
    "ctranslate2": [["ctranslate2==4.8.5"]],
    "transformers": [["transformers==5.23.0", "accelerate==1.15.0", "datasets", "sentencepiece"]],
    "fairseq": [
        ["hydra-core>=1.3,<1.4", "omegaconf>=2.3", "setuptools", "cython", "cffi", "regex", "sacrebleu"]
        + ["tqdm", "bitarray", "scikit-learn", "packaging"]
    ],
}

# (file, pattern, replacement): what stands between fairseq's main branch and Python 3.11, numpy 2, hydra 1.3.
REPAIRS = (
    # A dataclass that compares by value cannot be hashed, and is therefore refused as a default.
    ("fairseq/dataclass/configs.py", r"^@dataclass$", "@dataclass(eq=False)"),
    ("fairseq/models/transformer/transformer_config.py", r"^@dataclass$", "@dataclass(eq=False)"),
    # Names that numpy has dropped.
    ("fairseq/data/data_utils.py", r"\bnp\.int\b", "int"),
    ("fairseq/modules/dynamic_crf_layer.py", r'np\.float\("inf"\)', 'float("inf")'),
)

BUILD = """
import numpy, setuptools
from Cython.Build import cythonize
names = ("data_utils_fast", "token_block_utils_fast")
setuptools.setup(
    name="fairseq-modules",
    packages=[],
    script_args=["--quiet", "build_ext", "--inplace"],
    ext_modules=cythonize(
        [
            setuptools.Extension(
                f"fairseq.data.{name}",
                [f"fairseq/data/{name}.pyx"],
                language="c++",
                include_dirs=[numpy.get_include()],
                extra_compile_args=["-O3"],
            )
            for name in names
        ]
    ),
)
"""


def python_of(folder: Path, name: str) -> Path:
    """The interpreter of a toolkit's environment."""
    return folder / name / "bin" / "python"


def main() -> None:
    parser = argparse.ArgumentParser(description="Install the toolkits trmt is compared with.")
    parser.add_argument("folder", type=Path, help="where the environments go")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which (all): {', '.join(PACKAGES)}")
    parser.add_argument("--torch", type=Path, help="site-packages that hold torch")
    parser.add_argument("--fairseq", type=Path, help="a checkout of fairseq's main branch")
    given = parser.parse_args()
    names = given.names or [name for name in PACKAGES if name != "fairseq" or given.fairseq]
    if unknown := set(names) - set(PACKAGES):
        parser.error(f"there is no toolkit {', '.join(sorted(unknown))}")
    if "fairseq" in names and not given.fairseq:
        parser.error("fairseq needs --fairseq CHECKOUT")
    failed = []
    for name in names:
        try:
            environment(given.folder.resolve(), name, given.torch or site_packages_of_torch())
            if name == "fairseq":
                fairseq(given.folder.resolve(), given.fairseq)
            print(f"{name}: installed")
        except (subprocess.CalledProcessError, OSError, ValueError) as error:
            failed.append(name)
            print(f"{name}: {error}", file=sys.stderr)
    sys.exit(1 if failed else 0)


def site_packages_of_torch() -> Path:
    found = find_spec("torch")
    if not found or not found.origin:
        raise ValueError("this Python has no torch; pass --torch SITE_PACKAGES")
    return Path(found.origin).parent.parent


def environment(folder: Path, name: str, torch: Path) -> None:
    """Make the environment and install the packages by name."""
    subprocess.run([sys.executable, "-m", "venv", str(folder / name)], check=True)
    python = python_of(folder, name)
    see(python, "torch", torch.resolve())
    for packages in PACKAGES[name]:
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *packages], check=True)


def see(python: Path, label: str, place: Path) -> None:
    """Let an environment import from another place, after its own packages."""
    ask = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    own = subprocess.run([str(python), "-c", ask], check=True, capture_output=True, text=True).stdout.strip()
    (Path(own) / f"{label}.pth").write_text(f"{place}\n", encoding="utf-8")


def fairseq(folder: Path, checkout: Path) -> None:
    """Copy the checkout, repair and build the copy, and let the environment see it."""
    source = folder / "fairseq" / "source"
    shutil.rmtree(source, ignore_errors=True)
    # It has links that lead nowhere.
    shutil.copytree(checkout, source, symlinks=True, ignore=shutil.ignore_patterns(".git", "*.so", "build"))
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=checkout, capture_output=True, text=True)
    (folder / "fairseq" / "commit").write_text(commit.stdout.strip() or "unknown", encoding="ascii")
    repair(source)
    python = python_of(folder, "fairseq")
    subprocess.run([str(python), "-c", BUILD], cwd=source, check=True)
    see(python, "fairseq", source)


def repair(source: Path) -> None:
    """Apply REPAIRS; one whose place is gone is an error, one that is done already is not."""
    for name, pattern, replacement in REPAIRS:
        path = source / name
        text = path.read_text(encoding="utf-8")
        mended, count = re.subn(pattern, replacement, text, flags=re.MULTILINE)
        if not count and replacement not in text:
            raise ValueError(f"{path} is not as expected: nothing matches {pattern!r}")
        path.write_text(mended, encoding="utf-8")


if __name__ == "__main__":
    main()
