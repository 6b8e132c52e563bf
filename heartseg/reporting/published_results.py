"""Published results on CAMUS; second-hand rows are quoted from a repository, not checked against the paper itself."""


def _challenge(name: str, dice: tuple, hd_mm: tuple = ()) -> dict:
    """Dice and Hausdorff distances in mm of endo, epi and la, as far as published, each at (ED, ES)."""
    kinds = ("endo", "epi", "la")
    return {"name": name, "dice": dict(zip(kinds, dice, strict=False)), "hd_mm": dict(zip(kinds, hd_mm, strict=False))}


# CAMUS challenge: hidden 50 patients, native grid, per image; epi is labels 1 and 2 together.
CHALLENGE = (
    _challenge("U-Net (Leclerc 2019)", ((0.936, 0.912), (0.956, 0.946), (0.889, 0.918)), ((5.3, 5.5), (5.2, 5.7), (5.7, 5.3))),
    _challenge("CLAS (MICCAI 2020)", ((0.947, 0.929), (0.961, 0.955), (0.902, 0.927)), ((4.6, 4.6), (4.8, 4.9), (5.2, 4.8))),
    _challenge("nnU-Net (Ling 2023), second-hand", ((0.952, 0.935), (0.963, 0.959), (0.902, 0.935))),
    _challenge("An expert's second reading, second-hand", ((0.945, 0.930), (0.957, 0.951))),
)
# Official split (400 / 50 / 50), per image; myo is label 2 alone.
OFFICIAL_SPLIT = tuple(
    dict(zip(("name", "dice_endo", "dice_myo", "dice_la", "dice", "iou"), row, strict=True))
    for row in (
        ("nnU-Net v2 2D, 1000 epochs, native grid", 0.9446, 0.8920, 0.9239, 0.9202, None),
        ("TransUNet, 256 grid", 0.9367, 0.8789, 0.9208, 0.9121, 0.842),
        ("U-Net, ImageNet ResNet-34, 256 grid", 0.9341, 0.8742, 0.9160, 0.9081, 0.836),
        ("DeepLabV3+ ResNet-50, 100 epochs, 256 grid", None, None, None, 0.9140, None),
    )
)
# Challenge, predicted against the experts' masks: correlation, bias, standard deviation of the difference.
CLINICAL = (
    {"name": "U-Net (Leclerc 2019)", "ef": (0.845, 0.1, 7.3), "edv_ml": (0.926, 7.2, 15.6), "esv_ml": (0.960, 4.4, 10.2)},
    {"name": "CLAS (MICCAI 2020)", "ef": (0.926, -0.1, 6.7), "edv_ml": (0.958, -0.7, 15.1), "esv_ml": (0.979, 0.0, 8.4)},
)
