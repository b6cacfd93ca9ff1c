"""os-brick's iSCSI connector, but for the network: this kernel may have no iSCSI. Where iscsiadm would log in to a target,
losetup attaches the target's file, and a link says, as udev's does, that the device is this host's: the kernel may be that of
another one, too. All else is os-brick's own code, the links of encrypted volumes included."""
import os
import signal
import subprocess
import time

from os_brick import exception
from os_brick import utils
from os_brick.initiator.connectors import base
from os_brick.initiator.connectors import iscsi
from oslo_config import cfg


def losetup(*arguments):
    done = subprocess.run(['losetup', *arguments], capture_output=True, text=True)
    if done.returncode:
        raise exception.BrickException(done.stderr)
    return done.stdout.split()


# Where a volume is seen through FUSE that another host of this kernel has, too: while a server migrates live. It is another file
# then to the kernel, and to cryptattach, which refuses a volume that is behind two devices of one machine.
SECOND_VIEW = os.environ.get('SECOND_VIEW')


def view(properties):
    return os.path.join(SECOND_VIEW or '', os.path.basename(properties['loop_file']))


def has_view(properties):
    return bool(SECOND_VIEW) and os.path.exists(view(properties))


def seen(properties):
    """The target's file as this host sees it."""
    return view(properties) if has_view(properties) else properties['loop_file']


def begin_view(properties):
    file = view(properties)
    os.makedirs(SECOND_VIEW, exist_ok=True)
    open(file, 'w').close()
    subprocess.run(['qemu-storage-daemon', '--daemonize', '--pidfile', f'{file}.pid',
                    '--blockdev', f'file,node-name=volume,filename={properties["loop_file"]},locking=off',
                    '--export', f'fuse,id=export,node-name=volume,mountpoint={file},writable=on'], check=True)


def end_view(properties):
    file = view(properties)
    with open(f'{file}.pid') as pid:
        pid = int(pid.read())
    os.kill(pid, signal.SIGTERM)
    while os.path.ismount(file):
        time.sleep(0.1)
    os.unlink(file)


def link(properties):
    target = '-'.join((properties['target_portal'], 'iscsi', properties['target_iqn'], 'lun', str(properties['target_lun'])))
    return f'/dev/disk/by-path/ip-{target}'


def loops(properties):
    name = link(properties)
    ours = os.path.islink(name) and os.readlink(name)
    return [loop for loop in losetup('-n', '-O', 'NAME', '-j', seen(properties)) if loop == ours]


def unlink(properties):
    if os.path.islink(name := link(properties)):
        os.unlink(name)


def log_in(properties):
    if SECOND_VIEW and losetup('-n', '-O', 'NAME', '-j', properties['loop_file']):
        begin_view(properties)
    loop, = losetup('-f', '--show', f'--direct-io={"on" if has_view(properties) else "off"}', seen(properties))
    unlink(properties)
    os.makedirs('/dev/disk/by-path', exist_ok=True)
    os.symlink(loop, link(properties))
    return loop


class LoopConnector:
    @utils.trace
    @utils.connect_volume_prepare_result
    @base.synchronized('connect_volume', external=True)
    def connect_volume(self, connection_properties):
        loop, = loops(connection_properties) or [log_in(connection_properties)]
        return {'type': 'block', 'path': loop, 'scsi_wwn': connection_properties['volume_id'].replace('-', '')}

    @utils.trace
    @base.synchronized('connect_volume', external=True)
    @utils.connect_volume_undo_prepare_result(unlink_after=True)
    def disconnect_volume(self, connection_properties, device_info, force=False, ignore_errors=False,
                          is_disconnect_call=False):
        for loop in loops(connection_properties):
            losetup('-d', loop)
        unlink(connection_properties)
        if has_view(connection_properties):
            end_view(connection_properties)

    @utils.trace
    @base.synchronized('extend_volume', external=True)
    @utils.connect_volume_undo_prepare_result
    def extend_volume(self, connection_properties):
        size = os.stat(connection_properties['loop_file']).st_size
        if has_view(connection_properties):
            os.truncate(seen(connection_properties), size)
        for loop in loops(connection_properties):
            losetup('-c', loop)
        return size

    def get_volume_paths(self, connection_properties):
        return loops(connection_properties)


def put_in_place():
    for name in ('connect_volume', 'disconnect_volume', 'extend_volume', 'get_volume_paths'):
        setattr(iscsi.ISCSIConnector, name, LoopConnector.__dict__[name])
    properties = lambda *arguments, **named: {'initiator': f'iqn.2026-11.cryptattach:{cfg.CONF.host}'}
    iscsi.ISCSIConnector.get_connector_properties = staticmethod(properties)
