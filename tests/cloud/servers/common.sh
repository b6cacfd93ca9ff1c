# Sourced by up and down: the openstack layer's servers with their functions, and what this layer puts beside them.
CLOUD=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$CLOUD/../../openstack/servers/common.sh"
# The layers' packages do not mix: Keystone, Swift and Barbican run in the other layer's environment.
CLOUD_VENV=$CACHE/cloud-$(sha256sum "$CLOUD/requirements.txt" | cut -c1-12)
CB=$CLOUD_VENV/bin
GUEST=$CACHE/guest-$(cat "$CLOUD/guest" "$CLOUD/guest-init" | sha256sum | cut -c1-12)
RABBIT=$((BASE + 672)) ERLANG=$((BASE + 673)) EPMD=$((BASE + 369)) NEUTRON=$((BASE + 696))
GLANCE=$((BASE + 292)) CINDER=$((BASE + 776)) NOVA=$((BASE + 774)) PLACEMENT=$((BASE + 778))
APIS="glance cinder-api placement nova-api neutron"
WORKERS="cinder-scheduler cinder-volume cinder-backup nova-conductor nova-scheduler nova-compute"
