"""Plant each bug of tests/mutants/*.toml in a copy of the source and see that its test dies: `make mutants`.

One bug is ``[[mutant]]`` with ``name``, ``file`` (from the repository's root), ``find`` (once in that file),
``replace`` and ``test`` (a pytest node). Arguments name topics (files).
Exit 1 if a bug survives, exit 2 if one can no longer be planted.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main(topics: list[str]) -> int:
    mutants = [
        mutant
        for listing in sorted((ROOT / "tests" / "mutants").glob("*.toml"))
        for mutant in tomllib.loads(listing.read_text()).get("mutant", [])
        if not topics or listing.stem in topics
    ]
    survivors = [mutant["name"] for mutant in mutants if not dies(mutant)]
    print(f"{len(mutants) - len(survivors)} of {len(mutants)} planted bugs caught")
    for name in survivors:
        print(f"SURVIVED: {name}")
    return 1 if survivors or not mutants else 0


def dies(mutant: dict[str, str]) -> bool:
    """Whether the mutant's test fails with the bug planted."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT / "src", f"{folder}/src", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copytree(ROOT / "tests", f"{folder}/tests", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copytree(ROOT / "benchmarks", f"{folder}/benchmarks", ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("docs", "examples"):
            shutil.copytree(ROOT / name, f"{folder}/{name}", ignore=shutil.ignore_patterns("__pycache__"))
        for path in (*ROOT.glob("*.md"), *ROOT.glob("*.toml"), ROOT / "Makefile"):
            shutil.copy(path, folder)
        path = Path(folder, mutant["file"])
        source = path.read_text()
        if source.count(mutant["find"]) != 1:
            sys.exit(
                f"{mutant['name']}: {mutant['find']!r} stands {source.count(mutant['find'])} times in {mutant['file']}"
            )
        path.write_text(source.replace(mutant["find"], mutant["replace"]))
        run = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", "-m", "", "-p", "no:cacheprovider", mutant["test"]],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": f"{folder}/src"},
            capture_output=True,
            text=True,
            check=False,
        )
        if run.returncode not in (0, 1):  # 1 is "tests failed"; anything else says nothing about the bug
            stop(f"{mutant['name']}: {mutant['test']} did not run:\n{run.stdout[-2000:]}{run.stderr[-2000:]}")
        print(f"{'caught  ' if run.returncode else 'SURVIVED'}  {mutant['name']}", flush=True)
        return run.returncode == 1


def stop(why: str) -> None:
    """End with exit code 2: the listing is wrong, which says nothing about the tests."""
    print(why, file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
