"""How are a study's grid, points, laws and predictions put into words? Tables for tools/scaling_law.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # these load torch, which --help must not wait for
    from titans_pretrain.scaling.analysis import SeriesFit
    from titans_pretrain.scaling.collect import Collected
    from titans_pretrain.scaling.grid import Grid
    from titans_pretrain.scaling.predict import Prediction, Speed
    from titans_pretrain.scaling.study import Study


def table(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Columns of equal width; the first `left` are set left."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def grid_table(study: Study, grid: Grid, tflops: float | None, startup: float) -> str:
    """Every run with N, D and cost, and their sums."""
    from titans_pretrain.scaling.grid import ranks

    head = ("run", "N", "with embeddings", "w/o memory init", "tokens", "tokens/N", "steps", "batch", "rate", "FLOP")
    rows = [head]
    for run in grid.runs:
        config = run.config
        rate = f"{config.optimizer.learning_rate:.3g}"
        rows.append(
            (
                run.name,
                f"{run.counts['non_embedding']:,}",
                f"{run.counts['total']:,}",
                f"{run.counts['without_memory_init']:,}",
                f"{run.tokens:,}",
                f"{run.tokens / run.counts[study.count]:.3g}",
                f"{config.num_steps:,}",
                f"{config.data.batch_tokens:,}",
                f"({rate})" if run.series in grid.undecided and not run.swept else rate,
                f"{run.flops:.3g}",
            )
        )
    total = sum(run.flops for run in grid.runs)
    tokens = sum(run.tokens for run in grid.runs)
    lines = [
        table(rows),
        f"{len(grid.runs)} runs, {tokens:,} tokens, {total:.3g} FLOP; N as {study.count} sets the budgets",
    ]
    if grid.sweep:
        lines.append(f"{len(grid.sweep)} of them try learning rates, one of each size is kept as a point of the grid")
    if grid.undecided:
        lines.append(f"rates in brackets wait for the sweep, a middle one is shown: {', '.join(grid.undecided)}")
    if tflops:
        device = sum(run.flops / (tflops * 1e12) + startup * ranks(run.config) for run in grid.runs) / 3600
        wall = (
            sum(run.flops / (tflops * 1e12 * ranks(run.config)) + startup for run in grid.runs) / 3600 / study.parallel
        )
        lines.append(
            f"at {tflops:g} TFLOP/s a process: {device:,.2f} device-hours, {wall:,.2f} hours with {study.parallel} runs at once"
        )
    return "\n".join(lines)


def rates(settled: Mapping[str, Mapping[str, Any]]) -> str:
    """What sweeps of the learning rate came to."""
    lines = []
    for series, found in settled.items():
        said = ((base, f"{loss:.4f}" if isinstance(loss, float) else loss) for base, loss in found["losses"].items())
        losses = ", ".join(f"{base}: {loss}" for base, loss in said)
        lines.append(f"learning rate of {series}: base {found['base']:g} ({losses})")
        if found["warning"]:
            lines.append(f"  warning: {found['warning']}")
    return "\n".join(lines)


def collected(found: Collected) -> str:
    """A line for each point and each run that is none."""
    rows = [("run", "N", "tokens", "FLOP", "loss", "tokens/s", "MFU", "seconds")]
    for point in found.points:
        rows.append(
            (
                point.run,
                f"{point.parameters['non_embedding']:,}",
                f"{point.tokens:,}",
                f"{point.flops:.3g}",
                f"{point.loss:.4f}",
                f"{point.tokens_per_second:,.0f}",
                f"{100 * point.mfu:.1f} %" if point.mfu else "-",
                f"{point.seconds:,.0f}",
            )
        )
    lines = [table(rows), f"{len(found.points)} points, {len(found.left_out)} runs left out"]
    lines += [f"  left out: {name}: {why}" for name, why in found.left_out.items()]
    if found.rates:
        lines.append(rates(found.rates))
    return "\n".join(lines)


def fitted(each: SeriesFit) -> str:
    """The law of one series, and its checks."""
    law = each.fit.law
    formula = f"L = {law.E:.4f} + {law.A:.4g} / N^{law.alpha:.4f} + {law.B:.4g} / D^{law.beta:.4f}"
    lines = [
        f"{each.series}: {len(each.points)} runs, N {each.count}",
        f"  {formula}; residuals {100 * each.fit.rms:.2f} % rms",
    ]
    if each.fit.samples:
        parts = (
            f"{name} {low:.4g} .. {high:.4g}" for name in law.constants() for low, high in [each.fit.interval(name)]
        )
        lines.append(f"  95 % of {len(each.fit.samples)} bootstraps by run: {', '.join(parts)}")
    held = each.held_out
    if held is not None:
        lines.append(
            f"  largest budget ({held.budget}) of {len(held.names)} runs foretold by the others to {100 * held.error:.2f} %"
        )
    for valley in each.valleys:
        if valley.best_parameters:
            how = "the parabola through interpolated losses" if valley.interpolated else "the parabola"
            lines.append(
                f"  isoFLOP at {valley.flops:.3g}: best N {valley.law_parameters:.3g} by the law, "
                f"{valley.best_parameters:.3g} by {how}"
            )
    lines += [f"  {remark}" for remark in each.remarks]
    lines += [f"  warning: {warning}" for warning in each.warnings]
    return "\n".join(lines)


def ranking(found: Sequence[SeriesFit]) -> str:
    """The best loss of each series at the most compute that all have."""
    from titans_pretrain.scaling.fit import percentile
    from titans_pretrain.scaling.law import optimum

    flops = min(max(point.flops for point in each.points) for each in found)
    rows = [("series", "best loss", "95 %", "N", "tokens")]
    bests = []
    for each in found:
        sizes = [point.parameters[each.count] for point in each.points]
        ends = min(sizes), max(sizes)  # of what was trained: beyond, laws of small grids say anything
        best = optimum(each.fit.law, flops, each.cost, *ends)
        low, high = percentile([optimum(law, flops, each.cost, *ends).loss for law in each.fit.samples] or [best.loss])
        shown = (f"{best.loss:.4f}", f"{low:.4f} .. {high:.4f}", f"{best.parameters:.3g}", f"{best.tokens:.3g}")
        bests.append((best.loss, (each.series, *shown)))
    rows += [row for _, row in sorted(bests)]
    return f"best at {flops:.3g} FLOP by the laws, among the sizes trained:\n{table(rows)}"


def predicted(found: Prediction, speed: Speed | None, count: str) -> str:
    """The best run for a budget."""

    def around(interval: tuple[float, float] | None, form: str) -> str:
        return f" ({interval[0]:{form}} .. {interval[1]:{form}})" if interval else ""

    model, rate = found.config.model, found.config.optimizer.learning_rate
    lines = [
        f"{found.series} at {found.flops:.3g} FLOP",
        f"  best: N {found.best.parameters:.3g}{around(found.parameters_interval, '.3g')} ({count}), "
        f"{found.best.tokens:.3g} tokens{around(found.tokens_interval, '.3g')}",
        f"  nearest run: {model.num_layers} layers of {model.dim}, {found.parameters:,} parameters, {found.tokens:,} tokens, "
        f"batch {found.config.data.batch_tokens:,}, rate {rate:.3g}, {found.run_flops:.3g} FLOP",
        f"  loss {found.loss:.4f}{around(found.loss_interval, '.4f')} nats per token",
    ]
    if speed is None:
        lines.append("  cost unknown: the metrics have no MFU; --mfu and --peak-tflops say it")
    else:
        lines.append(
            f"  cost {speed.hours(found.run_flops):,.3g} device-hours at {100 * speed.mfu:.1f} % of {speed.peak_tflops:.4g} "
            f"TFLOP/s ({speed.source})"
        )
    return "\n".join([*lines, *(f"  warning: {warning}" for warning in found.warnings)])
