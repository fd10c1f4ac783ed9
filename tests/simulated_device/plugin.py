"""A pytest plugin: tests marked `gpu` then take the simulated device."""

from tests.simulated_device.backend import register

register()
