"""What all tests share."""

from hypothesis import HealthCheck, settings

# How fast the machine is says nothing about the code: a busy one must not fail a test.
settings.register_profile("segprop", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("segprop")
