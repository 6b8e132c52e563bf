"""What others publish on CAMUS, each row with its convention; the report shows ours beside it, never across conventions.

Second-hand rows are quoted by a repository and were not read in the paper itself.
"""

# CAMUS challenge: hidden 50 patients, native grid, per image; epi is labels 1 and 2 together. Dice (ED, ES), then the
# Hausdorff distance in mm (ED, ES).
CHALLENGE = (
    {
        "name": "U-Net (Leclerc 2019)",
        "dice": {"endo": (0.936, 0.912), "epi": (0.956, 0.946), "la": (0.889, 0.918)},
        "hd_mm": {"endo": (5.3, 5.5), "epi": (5.2, 5.7), "la": (5.7, 5.3)},
    },
    {
        "name": "CLAS (MICCAI 2020)",
        "dice": {"endo": (0.947, 0.929), "epi": (0.961, 0.955), "la": (0.902, 0.927)},
        "hd_mm": {"endo": (4.6, 4.6), "epi": (4.8, 4.9), "la": (5.2, 4.8)},
    },
    {
        "name": "nnU-Net (Ling 2023), second-hand",
        "dice": {"endo": (0.952, 0.935), "epi": (0.963, 0.959), "la": (0.902, 0.935)},
        "hd_mm": {},
    },
    {"name": "An expert's second reading, second-hand", "dice": {"endo": (0.945, 0.930), "epi": (0.957, 0.951)}, "hd_mm": {}},
)

# Official split (400 / 50 / 50), per image, myo is label 2 alone: Dice of endo, myo, la, their mean, mean IoU.
OFFICIAL_SPLIT = (
    {
        "name": "nnU-Net v2 2D, 1000 epochs, native grid",
        "dice_endo": 0.9446,
        "dice_myo": 0.8920,
        "dice_la": 0.9239,
        "dice": 0.9202,
    },
    {"name": "TransUNet, 256 grid", "dice_endo": 0.9367, "dice_myo": 0.8789, "dice_la": 0.9208, "dice": 0.9121, "iou": 0.842},
    {
        "name": "U-Net, ImageNet ResNet-34, 256 grid",
        **{"dice_endo": 0.9341, "dice_myo": 0.8742, "dice_la": 0.9160, "dice": 0.9081, "iou": 0.836},
    },
    {"name": "DeepLabV3+ ResNet-50, 100 epochs, 256 grid", "dice": 0.9140},
)

# Challenge, predicted against the experts' masks: correlation, bias, standard deviation of the difference.
CLINICAL = (
    {"name": "U-Net (Leclerc 2019)", "ef": (0.845, 0.1, 7.3), "edv_ml": (0.926, 7.2, 15.6), "esv_ml": (0.960, 4.4, 10.2)},
    {"name": "CLAS (MICCAI 2020)", "ef": (0.926, -0.1, 6.7), "edv_ml": (0.958, -0.7, 15.1), "esv_ml": (0.979, 0.0, 8.4)},
)
