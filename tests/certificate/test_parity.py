"""The parity numbers, and reading images from whatever the user has."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from ovit_engine.certificate import CertificateError
from ovit_engine.certificate.machine import may_saturate, this_machine
from ovit_engine.certificate.parity import (
    Reference,
    accuracy,
    compare,
    find_stored,
    hash_images,
    make_reference,
    random_sample,
    take_sample,
)

SHAPES, TYPES = [(1, 3)], [np.float32]


def test_numbers_written_out():
    reference = np.array([[3.0, 4.0], [0.0, -5.0]])
    parity = compare(np.array([[4.0, 3.0], [0.0, -5.0]]), reference, "data")
    assert (parity.images, parity.agreement) == (2, 0.5)
    assert parity.cosine == pytest.approx((24 / 25 + 1) / 2)
    assert parity.max_error == pytest.approx(1 / 5)


def test_zeros_are_parity_only_with_zeros():
    zeros = np.zeros((2, 3))
    assert compare(zeros, zeros, "data").cosine == 1.0
    assert compare(zeros, zeros + 1, "data").cosine == 0.0


def test_what_cannot_be_compared():
    with pytest.raises(CertificateError, match=r"shape \(2, 3\), PyTorch gives \(2, 4\)"):
        compare(np.zeros((2, 3)), np.zeros((2, 4)), "data")
    with pytest.raises(CertificateError, match="PyTorch's outputs hold NaN"):
        compare(np.zeros((1, 1)), np.full((1, 1), np.inf), "data")


def test_accuracy_needs_labels():
    logits = np.array([[0.0, 1.0], [1.0, 0.0]])
    hits = accuracy(logits, logits[::-1], np.array([1, 1]))
    assert (hits.file, hits.pytorch, hits.images) == (0.5, 0.5, 2)
    assert accuracy(logits, logits, None) is None


def test_one_column_has_no_accuracy():
    column = np.array([[-1.0], [2.0]])
    assert accuracy(column, column, np.array([0, 1])) is None


def test_the_classes_of_a_map_are_its_second_axis():
    reference = np.zeros((2, 3, 2, 2))
    reference[:, 1] = 1.0
    other = reference.copy()
    other[0, 2, 1, 0] = 2.0  # one of eight pixels is of another class
    assert compare(other, reference, "data").agreement == 7 / 8
    wider = reference + np.array([0.0, 5.0])  # a change along the width changes no class
    assert compare(wider, reference, "data").agreement == 1.0


@pytest.mark.parametrize("kind", ["loader", "dataset", "batches", "arrays", "single items", "no labels"])
def test_images_from_anything(kind):
    images, labels = torch.arange(150.0).reshape(50, 3), torch.arange(50)
    dataset = TensorDataset(images, labels)
    data = {
        "loader": DataLoader(dataset, batch_size=16),
        "dataset": dataset,
        "batches": [[images[:25], labels[:25]], [images[25:], labels[25:]]],
        "arrays": [(images.numpy(), labels.numpy())],
        "single items": [(image, int(label)) for image, label in dataset],
        "no labels": [images],
    }[kind]
    sample = take_sample(data, SHAPES, TYPES, limit=40)
    np.testing.assert_array_equal(sample.inputs[0], images[:40])
    if kind == "no labels":
        assert sample.labels is None
    else:
        assert sample.labels.tolist() == list(range(40))


def test_several_inputs_and_targets_that_are_no_classes():
    pair = (torch.randn(40, 3), torch.arange(40))
    sample = take_sample([(pair, torch.rand(40, 10))], [(2, 3), (2,)], [np.float32, np.int64])
    assert [array.dtype for array in sample.inputs] == [np.float32, np.int64]
    assert sample.labels is None


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ([torch.zeros(40, 4)], ValueError, r"shape \(4,\) an image, the model takes \(3,\)"),
        ([((torch.zeros(40, 3), torch.zeros(40, 3)), 0)], ValueError, "gives 2 inputs, the model takes 1"),
        ([()], ValueError, "a batch is empty"),
        ([{"x": torch.zeros(40, 3), "z": torch.zeros(40, 3), "labels": 0}], ValueError, r"by name \('x', 'z'\)"),
        ([], ValueError, "holds 0 images"),
        (7, TypeError, "got int"),
    ],
)
def test_data_that_does_not_fit(data, error, message):
    with pytest.raises(error, match=message):
        take_sample(data, SHAPES, TYPES)


def test_noise_is_the_same_every_time_and_never_for_integers():
    one, other = random_sample([(1, 3)], [np.float32]), random_sample([(9, 3)], [np.float32])
    assert one.inputs[0].shape == (256, 3)
    np.testing.assert_array_equal(one.inputs[0], other.inputs[0])
    with pytest.raises(ValueError, match="int64 cannot be drawn at random"):
        random_sample([(1, 3)], [np.int64])


def test_a_reference_comes_back_from_disk(tmp_path):
    sample = random_sample(SHAPES, TYPES, count=40)
    reference = make_reference(sample, np.ones((40, 2)))
    (tmp_path / "r.npz").write_bytes(reference.to_bytes())
    again = Reference.load(tmp_path / "r.npz")
    np.testing.assert_array_equal(again.stored[0], sample.inputs[0])
    np.testing.assert_array_equal(again.hashes, hash_images(sample.inputs))
    assert (again.labels, again.source, again.logits.shape) == (None, "random", (40, 2))


def test_images_are_found_again_in_any_order():
    sample = random_sample(SHAPES, TYPES, count=40)
    reference = make_reference(sample, np.arange(80).reshape(40, 2))
    shuffled = take_sample([sample.inputs[0][::-1].copy()], SHAPES, TYPES)
    _, found = find_stored(shuffled, reference)
    np.testing.assert_array_equal(found.logits, reference.logits[::-1])


def test_the_machine_is_described_from_proc(tmp_path):
    file = tmp_path / "cpuinfo"
    file.write_text("model name\t: Fast CPU\nflags\t\t: fpu avx2 avx512_vnni\n\nmodel name\t: second\n")
    machine = this_machine(file)
    assert (machine.cpu, machine.int8) == ("Fast CPU", ("avx512_vnni",))
    assert not may_saturate(machine)


def test_a_cpu_without_vnni_is_warned_about(tmp_path, monkeypatch):
    file = tmp_path / "cpuinfo"
    file.write_text("model name: Old CPU\nflags: avx2\n")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert may_saturate(this_machine(file))
    assert this_machine(tmp_path / "none").cpu


def test_a_file_that_is_no_reference_is_said_to_be_so(tmp_path):
    (tmp_path / "r.npz").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"r\.npz can't be read: "):
        Reference.load(tmp_path / "r.npz")
