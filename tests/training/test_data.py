"""Where images come from, and what is said when they can't."""

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from ovit_engine.certificate.parity import take_sample
from ovit_engine.training.api import evaluate
from ovit_engine.training.augmentation import GaussianNoise
from ovit_engine.training.data import config_of, load_data, model_data_config
from ovit_engine.training.images import UnreadableImageError

MakeFolder = Callable[..., Path]
CONFIG = model_data_config("resnet10t", {"img_size": 16})


def labels_of(dataset: Dataset[tuple[torch.Tensor, int]]) -> list[int]:
    return [dataset[index][1] for index in range(len(dataset))]  # type: ignore[arg-type]


def test_digits_hold_out_the_same_450_stratified() -> None:
    data = load_data("digits")
    assert (len(data.train), len(data.val), data.classes) == (1347, 450, 10)  # type: ignore[arg-type]
    held_out = np.bincount(labels_of(data.val))
    assert held_out.min() >= 43
    assert held_out.max() <= 46
    images = torch.stack([image for image, _ in data.train])  # type: ignore[attr-defined]
    assert images.shape == (1347, 1, 8, 8)
    assert images.mean() == pytest.approx(0, abs=1e-3)
    assert images.std() == pytest.approx(1, abs=1e-3)
    again = load_data("digits")
    assert all(torch.equal(data.val[i][0], again.val[i][0]) for i in range(450))
    train = {image.numpy().tobytes() for image in images}
    assert len(train) == 1347  # no two scans are the same, so none can be in both parts
    assert not train & {data.val[i][0].numpy().tobytes() for i in range(450)}


def test_digits_take_the_shape_of_the_model() -> None:
    data = load_data("digits", config={"input_size": (3, 16, 12)})
    assert data.train[0][0].shape == (3, 16, 12)
    assert data.preprocessing["size"] == [3, 16, 12]


def test_digits_are_not_flipped() -> None:
    with pytest.raises(ValueError, match="must not be flipped"):
        load_data("digits", augmentation="standard")


def test_noise_is_added_to_training_images_only() -> None:
    noise = torch.stack([GaussianNoise()(torch.zeros(1, 8, 8)) for _ in range(50)])
    assert 0.45 < float(noise.std()) < 0.55
    data = load_data("digits", augmentation="noise")
    assert not torch.equal(data.train[0][0], data.train[0][0])
    assert torch.equal(data.val[0][0], data.val[0][0])


def test_a_folder_with_train_and_val(image_folder: MakeFolder) -> None:
    data = load_data(image_folder(), config=CONFIG)
    assert (len(data.train), len(data.val), data.classes) == (8, 8, 2)  # type: ignore[arg-type]
    assert labels_of(data.train) == [0, 0, 0, 0, 1, 1, 1, 1]
    image, _ = data.train[3]
    mean, std = torch.tensor(CONFIG["mean"]), torch.tensor(CONFIG["std"])
    assert image.shape == (3, 16, 16)
    torch.testing.assert_close(image[:, 8, 8], (60 / 255 - mean) / std)  # the image of grey 60
    assert data.preprocessing["size"] == [3, 16, 16]
    assert config_of(data.preprocessing) == CONFIG


def test_the_other_name_of_val_and_augmentation(image_folder: MakeFolder) -> None:
    folder = image_folder(parts=("train", "validation"))
    data = load_data(folder, config=CONFIG, augmentation="standard")
    assert data.train[0][0].shape == (3, 16, 16)
    assert len(data.val) == 8  # type: ignore[arg-type]


def test_grey_images_for_a_model_of_one_channel(image_folder: MakeFolder) -> None:
    config = model_data_config("resnet10t", {"img_size": 16, "in_chans": 1})
    assert config["mean"] == pytest.approx((0.449,))
    image, _ = load_data(image_folder(), config=config).train[3]
    torch.testing.assert_close(image[0, 8, 8].item(), (60 / 255 - config["mean"][0]) / config["std"][0])


def test_a_model_of_four_channels_has_no_images(image_folder: MakeFolder) -> None:
    with pytest.raises(ValueError, match="1 or 3 channels, the model takes 4"):
        load_data(image_folder(), config=model_data_config("resnet10t", {"in_chans": 4}))


def test_a_timm_dataset_name(image_folder: MakeFolder) -> None:
    data = load_data("torch/image_folder", config=CONFIG, root=image_folder())
    assert data.classes == 2
    assert labels_of(data.val) == [0, 0, 0, 0, 1, 1, 1, 1]
    assert data.train[0][0].shape == (3, 16, 16)


def test_a_timm_dataset_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="timm can't load 'torch/cifar11'"):
        load_data("torch/cifar11", config=CONFIG, root=tmp_path)


def test_what_is_no_data(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no data '.*/none': give 'digits', an image folder"):
        load_data(tmp_path / "none", config=CONFIG)
    file = tmp_path / "a.txt"
    file.touch()
    with pytest.raises(ValueError, match="is a file"):
        load_data(file, config=CONFIG)
    with pytest.raises(ValueError, match=r"no train/: an image folder holds train/ and val/"):
        load_data(tmp_path, config=CONFIG)
    with pytest.raises(ValueError, match="no one size"):
        load_data(tmp_path)


def test_a_folder_that_misses_something(image_folder: MakeFolder) -> None:
    folder = image_folder(parts=("train",))
    with pytest.raises(ValueError, match="has no val/"):
        load_data(folder, config=CONFIG)
    (folder / "val").mkdir()
    with pytest.raises(ValueError, match=r"no images in '.*val'"):
        load_data(folder, config=CONFIG)
    (folder / "train" / "cat" / "0.png").rename(folder / "val" / "0.png")
    with pytest.raises(ValueError, match="lie in no class folder"):
        load_data(folder, config=CONFIG)


def test_other_classes_to_validate(image_folder: MakeFolder) -> None:
    folder = image_folder()
    (folder / "val" / "dog").rename(folder / "val" / "fox")
    with pytest.raises(ValueError, match="only in train: dog; only in val: fox"):
        load_data(folder, config=CONFIG)


def break_image(folder: Path, name: str) -> Path:
    path = folder / name
    path.write_bytes(path.read_bytes()[:40])
    return path


def test_an_unreadable_image_is_named_counted_and_stood_in_for(
    image_folder: MakeFolder, caplog: pytest.LogCaptureFixture
) -> None:
    folder = image_folder()
    cut = break_image(folder, "train/cat/1.png")
    empty = folder / "train" / "cat" / "2.png"
    empty.write_bytes(b"")
    data = load_data(folder, config=CONFIG)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):  # told once, not once an epoch
            assert labels_of(data.train) == [0, 0, 0, 0, 1, 1, 1, 1]
    assert torch.equal(data.train[1][0], data.train[3][0])
    assert data.unreadable == [str(cut), str(empty)]
    assert [record.getMessage().split(" is unreadable: ")[0] for record in caplog.records] == [
        f"image '{cut}'",
        f"image '{empty}'",
    ]
    assert "no image format is known in it" in caplog.text
    assert "BytesIO" not in caplog.text


def test_the_last_image_is_stood_in_for_by_the_first(image_folder: MakeFolder) -> None:
    folder = image_folder()
    break_image(folder, "val/dog/3.png")
    data = load_data(folder, config=CONFIG)
    image, label = data.val[7]
    assert torch.equal(image, data.val[0][0])
    assert label == -100


def test_a_stand_in_counts_in_no_accuracy(image_folder: MakeFolder) -> None:
    folder = image_folder()
    break_image(folder, "val/dog/3.png")
    loader = DataLoader(load_data(folder, config=CONFIG).val, batch_size=4)
    always_dog = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(2))
    always_dog(next(iter(loader))[0])
    always_dog[1].weight.data.zero_()
    always_dog[1].bias.data.copy_(torch.tensor([0.0, 1.0]))
    assert evaluate(always_dog, loader, torch.device("cpu")) == 3 / 7
    shape = tuple(next(iter(loader))[0].shape)
    sample = take_sample(list(loader) * 5, [shape], [np.float32])
    assert len(sample) == 35
    assert sorted(set(sample.labels.tolist())) == [0, 1]


def test_workers_count_too(image_folder: MakeFolder) -> None:
    folder = image_folder()
    cut = break_image(folder, "train/cat/1.png")
    data = load_data(folder, config=CONFIG)
    assert len(list(DataLoader(data.train, batch_size=4, num_workers=1))) == 2
    assert data.unreadable == [str(cut)]


def test_strict_stops_at_an_unreadable_image(image_folder: MakeFolder) -> None:
    folder = image_folder()
    cut = break_image(folder, "train/cat/1.png")
    data = load_data(folder, config=CONFIG, strict=True)
    assert data.train[0][1] == 0
    with pytest.raises(UnreadableImageError, match=f"'{cut}' is unreadable"):
        data.train[1]


def test_no_readable_image_at_all(image_folder: MakeFolder) -> None:
    folder = image_folder(count=1)
    for name in ("cat", "dog"):
        break_image(folder, f"train/{name}/0.png")
    with pytest.raises(UnreadableImageError, match="none of the 2 images can be read"):
        load_data(folder, config=CONFIG).train[0]


def test_preprocessing_of_someone_else() -> None:
    with pytest.raises(
        ValueError, match=r"not told \(size, std, crop, interpolation\): export with preprocessing=\{'size'"
    ):
        config_of({"mean": [0.5]})


@pytest.mark.parametrize("wrong", [{"size": 8}, {"mean": 0.5}, {"std": 0.5}])
def test_preprocessing_of_another_form(wrong: dict[str, object]) -> None:
    told = {"size": [3, 8, 8], "mean": [0.5] * 3, "std": [0.5] * 3, "crop": 1.0, "interpolation": "bicubic"}
    assert config_of(told)["input_size"] == (3, 8, 8)
    ((key, value),) = wrong.items()
    with pytest.raises(
        ValueError, match=rf"size, mean and std must be lists, not \{{.*'{key}': {value}\b.*export with"
    ):
        config_of({**told, **wrong})
