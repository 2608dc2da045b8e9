"""The summary that `tl fit` prints at its start."""

import re

import pytest

RUN = "fit --trainer.max_epochs 3 --model.backbone.width 4 --data.shots_per_class 4 --model.lr_scheduler null "


def rows(printed):
    """What each part does, and its rate."""
    found = {}
    for line in printed.splitlines():
        if match := re.match(r"(stage_\d|head|dann) +([\d,]+)  (.*?)\s*(\S+e?-?\d+)?$", line):
            found[match[1]] = (match[3].strip(), match[4])
    return found


@pytest.mark.parametrize(("options", "stages"), [
    ("FullFineTuning --model.finetuning.lr_decay 0.5", [("yes", "0.00038"), ("yes", "0.00075"), ("yes", "0.0015")]),
    ("FeatureExtraction", [("frozen", None)] * 3),
    ("LastStages", [("frozen", None)] * 2 + [("yes", "0.003")]),
    ("GradualUnfreezing", [("frozen", None), ("from epoch 2", "0.003"), ("from epoch 1", "0.003")]),
    ("FreezeThenUnfreeze --model.finetuning.unit steps --model.finetuning.after 4", [("from step 4", "0.003")] * 3),
    ("FreezeThenUnfreeze --model.finetuning.unit fraction --model.finetuning.after 0.5", [("from step 3", "0.003")] * 3),
])  # fmt: skip
def test_what_trains_from_when_and_how_fast(options, stages, ok):
    printed = ok(f"{RUN} --model.finetuning {options}")
    found = rows(printed)
    assert [found[f"stage_{number}"] for number in range(3)] == stages
    assert found["head"] == ("yes", "0.003")
    assert "samples   target: 40 train, 144 val" in printed
    assert "3 epochs of 2 batches, 20 samples: 6 steps" in printed
    assert "AdamW, constant" in printed


def test_what_opens_is_said_when_it_does(ok):
    printed = ok(f"{RUN} --model.finetuning GradualUnfreezing")
    assert printed.count("GradualUnfreezing:") == 1
    assert [line for line in printed.splitlines() if "unfreezes" in line] == [
        "epoch 1, step 2: unfreezes stage_2",
        "epoch 2, step 4: unfreezes stage_1",
    ]


def test_a_stage_that_opens_late_has_the_schedules_rate_of_then(ok):
    printed = ok(f"{RUN} --model.finetuning FreezeThenUnfreeze".replace("--model.lr_scheduler null", ""))
    # warm-up 0.3 steps of 6, cosine from there: step 2 is 1.7 / 5.7 of the way
    assert rows(printed)["stage_0"] == ("from epoch 1", f"{0.003 * 0.7960:.2g}")


def test_hidden_labels_methods_and_parts_of_stages(ok):
    printed = ok(
        "fit --trainer.max_steps 1 --trainer.limit_val_batches 1 --model.backbone.width 4 --data.source true "
        "--model.methods+=DANN --model.finetuning BitFit --model.finetuning.backbone_lr 0.1"
    )
    found = rows(printed)
    assert found["dann"][0] == "yes"
    assert re.fullmatch(r"yes, \d+ of them", found["stage_0"][0])
    assert re.search(r"source: [\d,]+ train, [\d,]+ val; target: [\d,]+ train without labels", printed)
    assert "30 samples of each domain: 1 steps" in printed
