from pathlib import Path

import numpy as np
import pytest

from sailer.training.plots import plot_confusion, plot_training

LABELS = ["Angry", "Happy", "Sad", "Other"]


def pixels(path: Path) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(path).convert("RGB"))


def test_confusion_matrix_is_a_picture_of_the_counts(tmp_path: Path) -> None:
    right = plot_confusion([0, 1, 2], [0, 1, 2], LABELS, tmp_path / "new" / "right.png")
    wrong = plot_confusion([0, 1, 2], [1, 2, 0], LABELS, tmp_path / "wrong.png")
    assert pixels(right).shape == pixels(wrong).shape
    assert (pixels(right) != pixels(wrong)).any()
    assert pixels(plot_confusion([], [], LABELS, tmp_path / "empty.png")).size


def test_confusion_matrix_writes_the_counts_and_the_clips_of_each_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = []
    monkeypatch.setattr("sailer.training.plots.save_figure", lambda figure, path: figures.append(figure))
    plot_confusion([0, 0, 0, 2], [0, 1, 1, 2], LABELS[:3], tmp_path / "confusion.png")
    axes = figures[0].axes[0]
    assert [text.get_text() for text in axes.texts] == ["1", "2", "0", "0", "0", "0", "0", "0", "1"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["Angry (3)", "Happy (0)", "Sad (1)"]
    np.testing.assert_allclose(axes.images[0].get_array(), [[1 / 3, 2 / 3, 0], [0, 0, 0], [0, 0, 1]])


@pytest.mark.parametrize(
    ("labels", "predictions", "message"),
    [([0, 1], [0], "2 labels but 1 predictions"), ([-1], [0], "outside 0 to 3"), ([0], [4], "outside 0 to 3")],
)
def test_confusion_matrix_refuses_what_does_not_fit(
    labels: list[int], predictions: list[int], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        plot_confusion(labels, predictions, LABELS, tmp_path / "confusion.png")
    assert not any(tmp_path.iterdir())


def test_training_curve_shows_losses_with_their_parts_and_the_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    history = [
        {
            "loss": 2.0,
            "loss_primary": 1.5,
            "loss_age": 0.5,
            "grad_norm": 9.0,
            "learning_rate": 1e-3,
            "epoch": 1.0,
            "step": 4,
        },
        {"eval_loss": 3.0, "eval_macro_f1": 0.2, "eval_runtime": 1.0, "epoch": 1.0, "step": 4},
        {
            "loss": 1.0,
            "loss_primary": 0.8,
            "loss_age": 0.2,
            "grad_norm": 8.0,
            "learning_rate": 0.0,
            "epoch": 2.0,
            "step": 8,
        },
        {"eval_loss": 2.5, "eval_macro_f1": 0.3, "eval_runtime": 1.0, "epoch": 2.0, "step": 8},
        {"train_runtime": 5.0, "train_loss": 1.5, "epoch": 2.0, "step": 8},
    ]
    assert pixels(plot_training(history, tmp_path / "curve.png")).size
    figures = []
    monkeypatch.setattr("sailer.training.plots.save_figure", lambda figure, path: figures.append(figure))
    plot_training(history, tmp_path / "curve.png")
    losses, metrics = (
        {line.get_label(): line.get_xydata().tolist() for line in axes.lines} for axes in figures[0].axes
    )
    assert losses == {
        "training": [[1, 2.0], [2, 1.0]],
        "its part: age": [[1, 0.5], [2, 0.2]],
        "its part: primary": [[1, 1.5], [2, 0.8]],
        "validation": [[1, 3.0], [2, 2.5]],
    }
    assert metrics == {"macro f1": [[1, 0.2], [2, 0.3]]}


def test_training_curve_without_a_loss_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no loss: log at least once"):
        plot_training([{"train_runtime": 5.0}], tmp_path / "curve.png")
