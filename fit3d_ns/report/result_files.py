"""`read_results`: finds the results of fit3d-probe and fit3d-finetune below files, folders and globs, and reads them.

In folders and globs, JSON that is no such result (configurations, records of other commands) is passed over and
counted; a file that is named has to be one.
"""

import glob
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fit3d_ns.report.table import TASK_COLUMNS
from fit3d_ns.utils.files import read_json
from fit3d_ns.utils.progress import notice
from fit3d_ns.utils.results import ResultRecord, check_report, load_result

_PROBE_PREFIX = "probe/"
_PUT_ASIDE = re.compile(r"\.[0-9a-f]{16}$")
"""End of the stem that fit3d-probe gives to records of other settings before it writes new ones in their place."""
_SKIPPED_FOLDERS = {"checkpoints", "nerfstudio_models", "tensorboard"}


@dataclass(frozen=True)
class ProbeResult:
    """A record of fit3d-probe, and where it was read."""

    path: Path
    record: ResultRecord

    @property
    def task(self) -> str:
        return self.record.kind.removeprefix(_PROBE_PREFIX)


@dataclass(frozen=True)
class FinetuneResult:
    """A `report.json` of fit3d-finetune, and where it was read."""

    path: Path
    report: dict[str, Any]


def read_results(patterns: Sequence[str | Path]) -> tuple[list[ProbeResult], list[FinetuneResult]]:
    """Reads all results below files, folders and globs (`**` descends), each file once, in the order of the patterns.

    ValueError if nothing is found, or names a file that is broken or of another kind, or two of the same settings.
    """
    probes: list[ProbeResult] = []
    finetunings: list[FinetuneResult] = []
    for path, is_named in _find_files(patterns):
        content = read_json(path)
        kind = content.get("kind") if isinstance(content, dict) else None
        if kind == "finetune":
            missing = [name for name in ("steps", "settings", "consistency") if name not in content]
            if missing:
                raise ValueError(f"{path} has no {', '.join(missing)}; it is not a finished report of fit3d-finetune.")
            check_report(content, path)
            finetunings.append(FinetuneResult(path, content))
        elif kind in [_PROBE_PREFIX + task for task in TASK_COLUMNS]:
            if not is_named and _PUT_ASIDE.search(path.stem):
                notice(f"{path} was put aside by a later run with other settings; it is passed over.")
                continue
            record = load_result(path)
            if not isinstance(record.metrics, dict) or not isinstance(record.settings, dict) or not record.metrics:
                raise ValueError(f"{path} holds no metrics; run its probe again.")
            probes.append(ProbeResult(path, record))
        elif is_named:
            found = f"a record of {kind!r}" if isinstance(kind, str) else "no record"
            raise ValueError(f"{path} is {found}; the report takes records of fit3d-probe and report.json files.")
    if not probes and not finetunings:
        named = ", ".join(map(str, patterns)) or "nothing"
        raise ValueError(f"No result of fit3d-probe or fit3d-finetune in {named}; give files or folders they wrote.")
    seen: dict[str, Path] = {}
    for probe in probes:
        key = probe.record.settings.get("key", str(probe.path))
        if key in seen:
            problem = f"{seen[key]} and {probe.path} hold metrics of the same settings (key {key})"
            raise ValueError(f"{problem}; leave one of them out, or run all seeds into one file.")
        seen[key] = probe.path
    return probes, finetunings


def _find_files(patterns: Sequence[str | Path]) -> list[tuple[Path, bool]]:
    """Paths and whether each was named itself; one that is found twice counts once."""
    found: dict[Path, tuple[Path, bool]] = {}
    for pattern in patterns:
        path = Path(pattern).expanduser()
        # A name that exists is taken as it is, brackets and all.
        matches = [path] if path.exists() else [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
        if not matches:
            raise ValueError(f"{pattern} matches no file or folder; give result files, folders or globs.")
        for match in matches:
            is_named = match == path and match.is_file()
            files = sorted(match.rglob("*.json")) if match.is_dir() else [match]
            for file in files:
                # Left out are folders of training states, hidden files and unfinished ones.
                is_skipped = file.name.startswith(".") or _SKIPPED_FOLDERS & {*file.relative_to(match).parts}
                if is_named or (file.suffix == ".json" and not is_skipped):
                    found.setdefault(file.resolve(), (file, is_named))
    return list(found.values())
