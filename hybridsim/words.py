"""What the numbers of an experiment say, in words: values, names, and the verdict in one line."""

import math
import re
from collections.abc import Mapping
from typing import Any

import xarray as xr

from hybridsim import gas
from hybridsim.drawing import plain_text
from hybridsim.results import Folder, layout_of, time_held


def show_place(folder: Folder, group: str) -> str:
    """`64 × 64 finite volume` for the filter and grid of a group of the reference."""
    size = " × ".join(str(n) for n in layout_of(folder.references[group])[0].shape)
    return f"{size} {str(group).rpartition('_')[0].replace('_', ' ')}"


def show_number(x: float | int | None, digits: int = 3) -> str:
    """0.0123 -> '0.0123', 3.2e-7 -> '3.2 × 10⁻⁷', None or NaN -> '–'.

    >>> show_number(3.21e-7, 2)
    '3.2 × 10⁻⁷'
    """
    if x is None or isinstance(x, str) or math.isnan(x):
        return "–"
    if math.isinf(x):
        return "∞"
    if x == 0 or 1e-3 <= abs(x) < 1e5:
        text = f"{x:.{digits}g}"
        return f"{x:.0f}" if "e" in text else text
    mantissa, exponent = f"{x:.{min(digits, 2) - 1}e}".split("e")
    return f"{mantissa} × 10{str(int(exponent)).translate(str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'))}"


def unbroken(text: str) -> str:
    """`t = 3`, `64 × 64` and the like stay on one line."""
    return re.sub(r" ([=≥×]) ", "\u00a0\\1\u00a0", text)


def show_part(part: Any) -> str:
    """`{use: smagorinsky, cs: 0.17}` -> `smagorinsky (cs 0.17)`; trained ones by the name of their weights alone."""
    if not isinstance(part, Mapping):
        return str(part)
    how = ("use", "evaluate", "seed")
    extra = [f"{k} {v}" for k, v in part.items() if k not in how and isinstance(v, str | int | float)]
    extra = [str(part["weights"])] if part.get("weights") else extra
    if isinstance(structure := part.get("structure"), Mapping):
        extra.append(f"{structure['form']} structure")
    name = str(part.get("use", "")).rpartition(":")[2].replace("_", " ")
    return f"{name} ({', '.join(extra)})" if extra else name


def show_solver(config: Mapping[str, Any]) -> str:
    """`64 × 64 finite volume`."""
    solver = config.get("solver")
    solver = solver.get("use", "") if isinstance(solver, Mapping) else solver or ""
    shape = config.get("shape") or ()
    return f"{' × '.join(str(n) for n in shape)} {str(solver).replace('_', ' ')}".strip()


def show_scheme(solver: Any) -> str:
    """`{use: finite_volume, reconstruction: ppm, riemann: hllc_low_mach}` -> `: ppm, hllc low mach`."""
    words = [v for k, v in solver.items() if k != "use" and isinstance(v, str)] if isinstance(solver, Mapping) else []
    return ": " + ", ".join(words).replace("_", "\u00a0") if words else ""


def show_unit(data: xr.DataArray) -> str:
    unit = str(data.attrs.get("units", "1"))
    return "" if unit in ("", "1") else f" [{plain_text(unit)}]"


def _bare_labels(summary: Mapping[str, Any], config: Mapping[str, Any] | None) -> dict[str, list[str]]:
    """Solver and grid -> labels of its bare runs. Without the configuration the names decide."""
    runs = summary.get("runs", {})
    if not config:
        return {"": [label for label in runs if label.startswith("bare")]}
    settings = config.get("runs") or {}
    found: dict[str, list[str]] = {}
    for label in runs:
        found.setdefault(show_solver(settings.get(label) or {}), [])
        if not (settings.get(label) or {}).get("corrections"):
            found[show_solver(settings.get(label) or {})].append(label)
    return found


def verdict(summary: Mapping[str, Any], config: Mapping[str, Any] | None = None) -> str:
    """One line: checks, divergences, and what each grid's best closure gained over its bare run in t95.

    With the resolved `config` runs are compared within their own solver and grid, against the best bare run there; without it,
    against the best run whose label starts with `bare`.
    """
    runs, checks = summary.get("runs", {}), summary.get("checks", [])
    failed = [c for c in checks if not c.get("passed")]
    parts = []
    if checks and not failed:
        parts.append(f"All {len(checks)} checks passed." if len(checks) > 1 else "The only check passed.")
    elif failed:
        names = list(dict.fromkeys(f"{c.get('run', 'all')}: {c.get('name')}" for c in failed))
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        parts.append(f"{len(failed)} of {len(checks)} checks failed ({shown}).")
    for label, numbers in runs.items():
        outcome = str(numbers.get("outcome", "finished"))
        if not outcome.startswith("finished"):
            parts.append(f"{label} {outcome}.")
    settings = (config or {}).get("runs") or {}
    if any("error" in numbers for numbers in runs.values()):
        return " ".join([*parts, *_gas_verdict(summary, config)]) or "Finished; nothing was compared or checked."
    for place, bare in _bare_labels(summary, config).items():
        here = [r for r in runs if r not in bare and (not config or show_solver(settings.get(r) or {}) == place)]
        scored = {r: t for r in here if (t := time_held(runs[r])) is not None}
        base = {r: t for r in bare if (t := time_held(runs[r])) is not None}
        where = f"On {place}, " if place else ""
        if not scored:
            if base and not here:
                best = max(base, key=lambda r: base[r])
                parts.append(f"{where}{best} keeps ρ ≥ 0.95 {_until(runs[best])}.")
            continue
        best = max(scored, key=lambda r: scored[r])
        text = f"{where}{best} keeps ρ ≥ 0.95 {_until(runs[best])}"
        if base:
            rival = max(base, key=lambda r: base[r])
            if runs[rival].get("t95") is None:
                text += f"; so does {rival}, so the window is too short to compare" if runs[best].get("t95") is None else ""
                text += f", {rival} {_until(runs[rival])}: no gain" if runs[best].get("t95") is not None else ""
            elif base[rival] > 0:
                ratio = scored[best] / base[rival]
                least = "at least " if runs[best].get("t95") is None else ""
                text += f", {least}{ratio:.2g} times as long as {rival} ({base[rival]:.2f})"
                text += ": no gain" if ratio <= 1 and not least else ""
        parts.append(text + ".")
    return " ".join([*parts, *_statistics_verdict(summary, config)]) or "Finished; nothing was compared or checked."


def _statistics_verdict(summary: Mapping[str, Any], config: Mapping[str, Any] | None) -> list[str]:
    """How far the long-run means are off."""
    errors = {r: n["statistics_error"] for r, n in summary.get("runs", {}).items() if n.get("statistics_error") is not None}
    if not errors or not judges_statistics(summary, config):
        return []
    ranked = sorted(errors, key=lambda r: errors[r])
    shown = ranked if len(ranked) <= 3 else [ranked[0], ranked[-1]]
    named = ", ".join(f"{r} {show_percent(errors[r])}" for r in shown)
    return [f"Largest error of {statistics_words(config, summary)}: {named}{'' if shown == ranked else ' (best and worst)'}."]


def _gas_verdict(summary: Mapping[str, Any], config: Mapping[str, Any] | None) -> list[str]:
    """What each grid's best closure gained over its bare run in the error at the stated time and, with cooling, in the phases."""
    runs = summary.get("runs", {})
    settings = (config or {}).get("runs") or {}
    at = stated_time(summary, config)
    when = f" at t = {show_number(at)}" if at is not None else ""
    measures = [("error", f"the error of ρ and √ρ v{when}")]
    if any(n.get("temperature_error") is not None for n in runs.values()):
        measures.insert(0, ("temperature_error", "the error of the mass per temperature"))
    parts = []
    for place, bare in _bare_labels(summary, config).items():
        where = f"On {place}, " if place else ""
        for key, words in measures:
            known = {r: n[key] for r, n in runs.items() if n.get(key) is not None}
            base = {r: e for r, e in known.items() if r in bare}
            here = {r for r in known if not config or show_solver(settings.get(r) or {}) == place}
            scored = {r: e for r, e in known.items() if r in here and r not in bare}
            if not scored and not base:
                continue
            best = min(scored or base, key=lambda r: known[r])
            text = f"{where}{words} is {show_percent(known[best])} with {best}"
            if scored and base:
                rival = min(base, key=lambda r: base[r])
                text += f", {show_percent(base[rival])} with {rival}"
                if known[best] >= base[rival]:
                    text += ": no gain"
                elif known[best] > 0:
                    text += f", {base[rival] / known[best]:.2g} times as much"
            parts.append(f"{text[0].upper()}{text[1:]}.")
    changes = (summary.get("reference") or {}).get("change") or {}
    change = max((c for name in gas.JUDGED if (c := changes.get(name)) is not None), default=0.0)
    if change > gas.TOLERANCE:
        parts.append(f"The reference itself is not converged then: half its resolution changes it by {show_percent(change)}.")
    stood = {r: n["floors"]["events"] for r, n in runs.items() if (n.get("floors") or {}).get("events")}
    if stood:
        named = ", ".join(f"{r} {show_number(count)} times" for r, count in stood.items())
        parts.append(f"Floors stood in for a density or pressure: {named}.")
    return [*parts, *_statistics_verdict(summary, config)]


def stated_time(summary: Mapping[str, Any], config: Mapping[str, Any] | None) -> float | None:
    """When the error of a gas is quoted."""
    stated = (n["error_at"] for n in summary.get("runs", {}).values() if n.get("error_at") is not None)
    compare, time = ((config or {}).get(key) or {} for key in ("compare", "time"))
    return next(stated, compare.get("at", time.get("end")))


def show_percent(share: float) -> str:
    return f"{show_number(100 * share, 2 if share < 1 else 3)} %"


def judges_statistics(summary: Mapping[str, Any], config: Mapping[str, Any] | None) -> bool:
    """Whether the page quotes the error of statistics: on a line, in 3D, between walls, with scalars, or where a check asks."""
    domain = (config or {}).get("domain") or {}
    sides = [kind for s in domain.get("boundaries") or () for kind in ([s] if isinstance(s, str) else s)]
    asked = any(c.get("name") == "statistics_error" for c in summary.get("checks", []))
    equation = (config or {}).get("equation")
    plain = not (isinstance(equation, Mapping) and equation.get("scalars"))
    usual = len(domain.get("lengths") or (0, 0)) == 2 and all(s == "periodic" for s in sides) and plain
    known = any(n.get("statistics_error") is not None for n in summary.get("runs", {}).values())
    of_gas = any("error" in n for n in summary.get("runs", {}).values())
    return known and (asked or of_gas or not usual)


def statistics_words(config: Mapping[str, Any] | None, summary: Mapping[str, Any]) -> str:
    """What the statistics are means of."""
    means = [set(n.get("statistics") or ()) for n in summary.get("runs", {}).values()]
    if any("mach" in names for names in means):
        emission = ", emission" if any("emission" in names for names in means) else ""
        return f"mean Mach number, density fluctuation, energies, enstrophy{emission} and dilatation"
    if len(((config or {}).get("domain") or {}).get("lengths") or (0, 0)) == 1:
        return "the mean squares of u, uₓ and uₓₓ"
    equation = (config or {}).get("equation")
    scalars = isinstance(equation, Mapping) and equation.get("scalars")
    return "mean energy, enstrophy and scalar variance" if scalars else "mean energy and enstrophy"


def _until(numbers: Mapping[str, Any]) -> str:
    """`to t = 3.14`, or `beyond t = 5`."""
    if numbers.get("t95") is not None:
        return f"to t = {numbers['t95']:.2f}"
    return f"beyond t = {show_number(numbers.get('t95_at_least'))}"
