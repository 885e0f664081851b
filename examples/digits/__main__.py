"""Train one network per norm, once through normfast and once on plain NumPy norms: `python -m examples.digits`."""

from __future__ import annotations

import argparse
from pathlib import Path
from time import perf_counter

import numpy as np
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from threadpoolctl import threadpool_limits

import normfast as nf

from . import plots
from .train import NORMS, Digits, accuracy, new_run, train

ROUNDING = 1e-9  # float64 keeps 16 digits of a loss near 1; a few hundred steps of training amplify the last ones


def main():
    options = parse_options()
    console = Console()
    start = perf_counter()
    digits = Digits.load(options.seed, options.dtype)
    console.print(
        f"\n[bold]Handwritten digits[/bold]: {len(digits.train_labels)} to learn from,"
        f" {len(digits.test_labels)} to test on.\n"
        "One network per norm, trained twice side by side from the same seed: with the norms of normfast, and with\n"
        f"norms in plain NumPy. Epochs: {options.epochs}, dtype: {options.dtype}, normfast {nf.__version__} on "
        f"{nf.get_num_threads()} threads, NumPy {np.__version__}.\n",
        soft_wrap=True,
    )
    # The matrix products are small: more BLAS threads would spend their time waiting for each other.
    with threadpool_limits(1, user_api="blas"):
        runs = train_all(digits, options, console)
    console.print(results(runs, digits))
    console.print(verdict(runs, options), soft_wrap=True)
    options.output.mkdir(parents=True, exist_ok=True)
    through_normfast = {name: pair[0] for name, pair in runs.items()}
    pictures = [
        plots.learning_curves(runs, options.output / "learning-curves.png"),
        plots.misclassified(through_normfast, digits, options.output / "misclassified.png"),
    ]
    console.print(f"\nPictures: {', '.join(str(picture) for picture in pictures)}")
    console.print(f"All done in {perf_counter() - start:.0f} s.")


def parse_options():
    parser = argparse.ArgumentParser(prog="python -m examples.digits", description=__doc__)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=["float64", "float32"], default="float64")
    parser.add_argument("--output", type=Path, default=Path("demo-output"))
    return parser.parse_args()


def train_all(digits, options, console):
    """Name of the norm -> (run through normfast, run on plain NumPy norms)."""
    runs = {}
    columns = (
        TextColumn("{task.description:<22}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(NORMS) * options.epochs * 2)
        for name, layers in NORMS.items():
            progress.update(task, description=f"training, {name}")
            pair = [new_run(layer, options.seed, options.dtype) for layer in layers]
            train(pair, digits, epochs=options.epochs, seed=options.seed, advance=lambda: progress.advance(task))
            runs[name] = pair
        progress.update(task, description="trained")
    return runs


def results(runs, digits):
    table = Table(
        title="Accuracy, and seconds spent in the norms while training",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("network", no_wrap=True)
    for heading in ("train", "test", "normfast", "NumPy", "faster", "curves differ"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, (ours, plain) in runs.items():
        table.add_row(
            name,
            f"{accuracy(ours.network, digits.train_images, digits.train_labels):.1%}",
            f"[bold]{ours.test_accuracies[-1]:.1%}[/bold]",
            f"{ours.norm_seconds:.2f} s",
            f"{plain.norm_seconds:.2f} s",
            f"{plain.norm_seconds / ours.norm_seconds:.1f} x",
            f"{curve_difference(ours, plain):.0e}",
        )
    return table


def curve_difference(ours, plain):
    """Largest difference between the losses of the two runs, over all steps."""
    return np.abs(np.subtract(ours.step_losses, plain.step_losses)).max()


def verdict(runs, options):
    """What the last column of the table says, in words."""
    steps = len(next(iter(runs.values()))[0].step_losses)
    largest = max(curve_difference(*pair) for pair in runs.values())
    text = f"Over {steps} steps the training losses through normfast and NumPy differ by at most {largest:.0e}: "
    if largest < ROUNDING:
        return text + "the same curves, to rounding."
    if options.dtype == "float32":
        return text + "training amplifies the rounding of float32. In float64 the curves agree."
    return text + "[bold red]more than rounding explains.[/bold red]"


if __name__ == "__main__":
    main()
