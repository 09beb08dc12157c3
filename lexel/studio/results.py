"""Results of `lexel evaluate` and `lexel compare`, as tables: those that are on one scale stand together."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lexel.checkpoint import read_json
from lexel.errors import UsageError
from lexel.evaluate import compare_results, read_result
from lexel.leaderboard import CODE, HIGHER_IS_BETTER, bits_of, code_of, conditions

COMPARISON = "compare.json"  # in the folder that `lexel compare` writes


def find(path: Path) -> Path | None:
    """The file of results that a source names: itself, or that of a comparison's folder; None where it is neither."""
    if path.is_file() and path.suffix == ".json":
        return path
    return path / COMPARISON if (path / COMPARISON).is_file() else None


def check(path: Path) -> None:
    """Refuses a file that holds no results.

    Raises:
        UsageError: it is neither of `lexel evaluate` nor of `lexel compare`.
    """
    if path.name != COMPARISON:
        read_result(path)
        return
    _comparison(path)


def shown(files: Mapping[str, Path]) -> dict[str, Any]:
    """All results as tables.

    Args:
        files: by name; each is read anew.

    Returns:
        `boards`, one for every scale, and `comparisons`, one for every `compare.json`.

    Raises:
        UsageError: a file is gone or damaged.
    """
    results = {name: read_result(path) for name, path in files.items() if path.name != COMPARISON}
    comparisons = [{"name": name, **_comparison(path)} for name, path in files.items() if path.name == COMPARISON]
    return {"boards": [board(group, apart) for group, apart in groups(results)], "comparisons": comparisons}


def groups(results: Mapping[str, dict[str, Any]]) -> list[tuple[dict[str, dict[str, Any]], str]]:
    """Results in groups within which every two can be compared, and why each group stands apart from the first."""
    found: list[tuple[dict[str, dict[str, Any]], str]] = []
    for name, result in results.items():
        apart = ""
        for group, _ in found:
            reason = _reason(group.values(), result)
            if reason is None:
                group[name] = result
                break
            apart = apart or reason
        else:
            found.append(({name: result}, apart))
    return found


def board(results: Mapping[str, dict[str, Any]], apart: str) -> dict[str, Any]:
    """One table: a row a result, a column a metric."""
    first = next(iter(results.values()))
    metrics = list(dict.fromkeys(name for result in results.values() for name in result["metrics"]))
    rows = []
    for name, result in results.items():
        values = {metric: _value(result, metric) for metric in metrics}
        rows.append({"name": name, "bits": bits_of(result), "values": values, "code": code_of(result)})
    return {
        "protocol": first["protocol"]["name"],
        "images": first["data"]["images"],
        "set": first.get("public_set"),
        "metrics": [{"name": metric, "higher": metric in HIGHER_IS_BETTER} for metric in metrics],
        "rows": rows,
        "code": list(CODE),
        "conditions": conditions(first)[1:],
        "warnings": sorted({warning for result in results.values() for warning in result["warnings"]}),
        "apart": apart,
    }


def _value(result: Mapping[str, Any], metric: str) -> dict[str, float | None] | None:
    value, interval = result["metrics"].get(metric), result["intervals"].get(metric, {})
    return None if value is None else {"value": value, "low": interval.get("low"), "high": interval.get("high")}


def _reason(group: Sequence[Mapping[str, Any]] | Any, result: Mapping[str, Any]) -> str | None:
    """Why a result cannot be compared with one of a group; None where it can with all."""
    for other in group:
        try:
            compare_results(other, result)
        except UsageError as error:
            return str(error)
    return None


def _comparison(path: Path) -> dict[str, Any]:
    """The table of a `compare.json`.

    Raises:
        UsageError: the file is damaged.
    """
    if not path.is_file():
        raise UsageError(f"{path} is gone; open the studio anew")
    from lexel.compare.summary import table  # imports training

    found = read_json(path)
    try:
        head, *rows = table(found["rows"])
        return {"head": head, "rows": rows, "runs": len(found["runs"])}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UsageError(f"{path} is no comparison of `lexel compare`: {type(error).__name__} {error}") from None
