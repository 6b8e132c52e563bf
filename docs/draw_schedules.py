"""Draws every learning-rate schedule into docs/explanation/schedules.png: `python docs/draw_schedules.py`."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from heartseg.config.training import ScheduleConfig
from heartseg.reporting.plots import INK, plain, save_png
from heartseg.reporting.sweep_page import SCHEDULE_COLOURS
from heartseg.training.lr_schedules import lr_multiplier

figure = Figure(figsize=(9.0, 5.4), layout="constrained")
gains = [min(epoch, 30) if epoch < 45 else min(epoch, 60) for epoch in range(100)]  # `plateau`: they end at 30 and 60
for axes, (kind, colour) in zip(figure.subplots(3, 3, sharex=True, sharey=True).flat, SCHEDULE_COLOURS.items(), strict=True):
    config = ScheduleConfig(kind, warmup_epochs=5)
    rates = [lr_multiplier(config, step, 1000, 10, gains[1 : step // 10 + 1]) for step in range(1000)]
    axes.plot(np.arange(1000) / 10, rates, color=colour, linewidth=2)
    axes.set_title(kind, color=INK, fontsize=10, loc="left")
    plain(axes, labelsize=8)
    axes.grid(color=INK, alpha=0.12, linewidth=0.7)
figure.supxlabel("epoch", color=INK, fontsize=9)
figure.supylabel("learning rate / base rate", color=INK, fontsize=9)
Path(__file__).with_name("explanation").joinpath("schedules.png").write_bytes(save_png(figure, dpi=100))
