"""os-brick and castellan attach a volume through cryptattach: brick.py inproc|privsep

Environment: CRYPTATTACH, CRYPTATTACH_CONFIG, TOKEN (of the user), DEVICE (a blank loop device), FILE (behind it).
"""
import logging
import os
import stat
import subprocess
import sys

import os_brick
import os_brick.exception
from castellan import key_manager
from castellan.common import exception
from os_brick import encryptors
from os_brick import privileged
from os_brick import utils
from os_brick.initiator.connectors import iscsi
from oslo_concurrency import processutils
from oslo_config import cfg
from oslo_context import context

token, device, file = os.environ['TOKEN'], os.environ['DEVICE'], os.environ['FILE']
logging.basicConfig(level=logging.DEBUG, filename=os.environ['LOG'])
os_brick.setup(cfg.CONF)
cfg.CONF([], project='cryptattach-test', default_config_files=[])
if sys.argv[1] == 'inproc':
    privileged.default.set_client_mode(False)
else:
    from oslo_privsep import priv_context
    priv_context.init(root_helper=['env'])

# As nova.conf and cinder.conf select it.
cfg.CONF.register_opts(key_manager.key_manager_opts, group='key_manager')
cfg.CONF.set_override('backend', 'cryptattach', group='key_manager')
manager = key_manager.API(cfg.CONF)
user = context.RequestContext(auth_token=token, project_id=os.environ['PROJECT_ID_KEYS'])
key_id = manager.create_key(user, algorithm='aes', length=512)
print('created', key_id)


class Connector(iscsi.ISCSIConnector):
    """A connector of os-brick's but for the network: the volume is a loop device."""

    @utils.connect_volume_prepare_result
    def connect_volume(self, properties):
        return {'type': 'block', 'path': device}

    @utils.connect_volume_undo_prepare_result(unlink_after=True)
    def disconnect_volume(self, connection_properties, device_info, force=False, ignore_errors=False):
        assert device_info['path'] == device, device_info


os.makedirs('/dev/disk/by-id', exist_ok=True)
connector = Connector('env')
properties = {'encrypted': True, 'volume_id': 'volume-9'}
encryption = dict(provider='cryptattach_openstack.encryptor.CryptattachEncryptor', control_location='front-end',
                  cipher='aes-xts-plain64', key_size=512, encryption_key_id=key_id)


def encryptor(connected):
    data = {**properties, 'device_path': connected['path'], 'target_portal': '192.0.2.7:3260', 'target_iqn': 'iqn.x:y'}
    info = {'driver_volume_type': 'iscsi', 'serial': 'volume-9', 'data': data}
    return encryptors.get_volume_encryptor(root_helper='env', keymgr=manager, connection_info=info, **encryption)


def attach():
    connected = connector.connect_volume(properties)
    encryptor(connected).attach_volume(user, **encryption)
    path = os.path.realpath(connected['path'])
    assert stat.S_ISBLK(os.stat(path).st_mode) and path != device, path
    return connected


def detach(connected):
    # A new object, without a user; and again, as Nova does when it cleans up.
    encryptor(connected).detach_volume(**encryption)
    encryptor(connected).detach_volume(**encryption)
    connector.disconnect_volume(properties, connected)
    assert not os.path.lexists(connected['path']), 'the link is left'


connected = attach()
with open(connected['path'], 'r+b') as volume:
    volume.write(b'the quick brown fox' * 1000)
    os.fsync(volume.fileno())
print('attached and written', os.path.realpath(connected['path']))
encryptor(connected).attach_volume(user, **encryption)
print('attached again')

before = int(subprocess.check_output(['blockdev', '--getsize64', os.path.realpath(connected['path'])]))
os.truncate(file, os.path.getsize(file) + (32 << 20))
subprocess.check_call(['losetup', '-c', device])
size = encryptor(connected).extend_volume(user, **encryption)
now = int(subprocess.check_output(['blockdev', '--getsize64', os.path.realpath(connected['path'])]))
assert size == now == before + (32 << 20), (size, now, before)
print('extended to', size)
detach(connected)
print('detached')

with open(device, 'rb') as volume:
    assert b'quick brown' not in volume.read(), 'plaintext on the device'
connected = attach()
with open(connected['path'], 'rb') as volume:
    assert volume.read(19) == b'the quick brown fox'
detach(connected)
print('read again')

# The same key, another blank device: refused, for the volume's data must be somewhere.
subprocess.check_call(['dd', 'if=/dev/zero', 'of=' + device, 'bs=1M', 'count=32', 'status=none'])
connected = connector.connect_volume(properties)
try:
    encryptor(connected).attach_volume(user, **encryption)
    raise SystemExit('a used key formatted another device')
except processutils.ProcessExecutionError as error:
    assert error.exit_code == 73 and 'has already been used' in error.stderr, error
connector.disconnect_volume(properties, connected)
print('a used key formats nothing')

# What is no block device: os-brick has no path to it (rbd), or it is a file, in whose place no link is put (NFS).
export = os.environ['LOG'] + '.volume'
with open(export, 'wb') as made:
    made.truncate(32 << 20)
for kind, data in (('rbd', {'name': 'volumes/volume-9'}), ('nfs', {'export': '192.0.2.7:/x', 'device_path': export})):
    info = {'driver_volume_type': kind, 'serial': 'volume-9', 'data': data}
    try:
        encryptors.get_volume_encryptor(
            root_helper='env', keymgr=manager, connection_info=info, **encryption).attach_volume(user, **encryption)
        raise SystemExit(f'a volume of {kind} was attached')
    except os_brick.exception.VolumeEncryptionNotSupported as error:
        assert kind == 'rbd', error
    except processutils.ProcessExecutionError as error:
        assert kind == 'nfs' and error.exit_code == 64 and 'is not a symbolic link' in error.stderr, error
with open(export, 'rb') as made:
    assert os.path.getsize(export) == 32 << 20 and not any(made.read())
print('what is no block device is refused')

manager.delete(user, key_id)
try:
    manager.get(user, key_id)
    raise SystemExit('a deleted key is still there')
except exception.ManagedObjectNotFoundError:
    print('deleted')
with open(os.environ['LOG']) as log:
    assert token not in log.read(), 'the token is in the log'
