# The same targets in CI and on a laptop. Each installs what it misses.
.PHONY: deb demo fuzz openstack-releases test test-unit test-fuzz test-host test-openstack test-vm test-cloud bench bench-ublk bench-attach bench-bind journeys-bind bench-boot bench-fleet bench-initramfs bench-keys bench-rotate bench-sources bench-stores bench-tpm torture crashes power-cuts torture-keys

deb:
	scripts/deb

demo:
	scripts/demo

# Five minutes for each target.
fuzz:
	scripts/fuzz

test:
	scripts/test

test-unit test-fuzz test-host test-openstack test-vm test-cloud:
	scripts/test $(@:test-%=%)

# Seven to nine minutes for each release and Python, on two cores that have other work.
openstack-releases:
	scripts/openstack-releases

bench:
	benches/datapath

bench-ublk:
	benches/ublk

torture:
	benches/torture

# An hour.
crashes:
	benches/crashes

power-cuts:
	benches/power-cuts

torture-keys:
	benches/torture-keys

bench-attach:
	benches/attach

bench-bind:
	benches/bind

journeys-bind:
	benches/bind-journeys

bench-boot:
	benches/boot

# A quarter of an hour.
bench-fleet:
	benches/fleet

bench-initramfs:
	benches/initramfs

bench-keys:
	benches/keys

bench-rotate:
	benches/rotate

bench-stores:
	benches/stores

bench-sources:
	benches/sources

bench-tpm:
	benches/tpm
