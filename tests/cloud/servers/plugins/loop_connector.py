"""os-brick's iSCSI connector, but for the network: this kernel may have no iSCSI. Where iscsiadm would log in to a target,
losetup attaches the target's file. All else is os-brick's own code, the links of encrypted volumes included."""
import os
import subprocess

from os_brick import exception
from os_brick import utils
from os_brick.initiator.connectors import base
from os_brick.initiator.connectors import iscsi


def losetup(*arguments):
    done = subprocess.run(['losetup', *arguments], capture_output=True, text=True)
    if done.returncode:
        raise exception.BrickException(done.stderr)
    return done.stdout.split()


def loops(properties):
    return losetup('-n', '-O', 'NAME', '-j', properties['loop_file'])


class LoopConnector:
    @utils.trace
    @utils.connect_volume_prepare_result
    @base.synchronized('connect_volume', external=True)
    def connect_volume(self, connection_properties):
        file = connection_properties['loop_file']
        loop, *_ = loops(connection_properties) or losetup('-f', '--show', file)
        return {'type': 'block', 'path': loop, 'scsi_wwn': connection_properties['volume_id'].replace('-', '')}

    @utils.trace
    @base.synchronized('connect_volume', external=True)
    @utils.connect_volume_undo_prepare_result(unlink_after=True)
    def disconnect_volume(self, connection_properties, device_info, force=False, ignore_errors=False,
                          is_disconnect_call=False):
        for loop in loops(connection_properties):
            losetup('-d', loop)

    @utils.trace
    @base.synchronized('extend_volume', external=True)
    @utils.connect_volume_undo_prepare_result
    def extend_volume(self, connection_properties):
        for loop in loops(connection_properties):
            losetup('-c', loop)
        return os.stat(connection_properties['loop_file']).st_size

    def get_volume_paths(self, connection_properties):
        return loops(connection_properties)


def put_in_place():
    for name in ('connect_volume', 'disconnect_volume', 'extend_volume', 'get_volume_paths'):
        setattr(iscsi.ISCSIConnector, name, LoopConnector.__dict__[name])
    properties = {'initiator': 'iqn.2026-11.cryptattach:host'}
    iscsi.ISCSIConnector.get_connector_properties = staticmethod(lambda *arguments, **named: properties)
