"""Two projects, through castellan and os-brick. Environment: TOKEN of the one whose keys they are, OTHER_TOKEN; DEVICE and
BLANK, blank loop devices; NAME of a mapping."""
import json
import os
import subprocess

import os_brick
from castellan import key_manager
from castellan.common import exception
from os_brick import encryptors
from os_brick import privileged
from oslo_concurrency import lockutils  # noqa: F401 (registers options that os-brick looks for)
from oslo_concurrency import processutils
from oslo_config import cfg
from oslo_context import context

os_brick.setup(cfg.CONF)
cfg.CONF([], project='cryptattach-test', default_config_files=[])
privileged.default.set_client_mode(False)
cfg.CONF.register_opts(key_manager.key_manager_opts, group='key_manager')
cfg.CONF.set_override('backend', 'cryptattach', group='key_manager')
manager = key_manager.API(cfg.CONF)
owner = context.RequestContext(auth_token=os.environ['TOKEN'], project_id=os.environ['PROJECT_ID_KEYS'])
other = context.RequestContext(auth_token=os.environ['OTHER_TOKEN'], project_id=os.environ['PROJECT_ID_DEMO'])
key, unused = (manager.create_key(owner, algorithm='aes', length=256) for _ in range(2))


def encryptor(device, key_id):
    encryption = dict(provider='cryptattach_openstack.encryptor.CryptattachEncryptor', control_location='front-end',
                      cipher='aes-xts-plain64', key_size=256, encryption_key_id=key_id)
    info = {'driver_volume_type': 'local', 'serial': 'v', 'data': {'device_path': device, 'volume_id': 'v'}}
    made = encryptors.get_volume_encryptor(root_helper='env', keymgr=manager, connection_info=info, **encryption)
    # The mapping's name is made of the device's; the link has to be no device.
    made.dev_name, made.symlink_path = os.environ['NAME'], '/dev/disk/by-id/' + os.environ['NAME']
    return made, encryption


def refused(what, call, *arguments, **members):
    try:
        call(*arguments, **members)
    except exception.ManagedObjectNotFoundError:
        return print(what, '-> not found')
    except exception.Forbidden:
        return print(what, '-> forbidden')
    except processutils.ProcessExecutionError as error:
        assert error.exit_code in (67, 77), error
        return print(what, '->', error.exit_code)
    raise SystemExit(f'{what}: it was done')


os.makedirs('/dev/disk/by-id', exist_ok=True)
made, encryption = encryptor(os.environ['DEVICE'], key)
made.attach_volume(owner, **encryption)
for key_id in (key, unused):
    refused('get', manager.get, other, key_id)
    refused('get metadata', manager.get, other, key_id, metadata_only=True)
    refused('delete', manager.delete, other, key_id)
    refused('delete by force', manager.delete, other, key_id, force=True)
    consumer = {'service': 'cinder', 'resource_type': 'volume', 'resource_id': 'v'}
    refused('add a consumer', manager.add_consumer, other, key_id, consumer)
    refused('remove a consumer', manager.remove_consumer, other, key_id, consumer)
    for device in (os.environ['DEVICE'], os.environ['BLANK']):
        theirs, encryption = encryptor(device, key_id)
        refused('attach', theirs.attach_volume, other, **encryption)
        refused('extend', theirs.extend_volume, other, **encryption)
try:
    assert not {listed.id for listed in manager.list(other, metadata_only=True)} & {key, unused}
except exception.Forbidden:
    print('list -> forbidden')
with open(os.environ['BLANK'], 'rb') as device:
    assert not any(device.read(1 << 20)), 'it was formatted'
made, encryption = encryptor(os.environ['DEVICE'], key)
made.attach_volume(owner, **encryption)
made.detach_volume(**encryption)
for key_id in (key, unused):
    manager.delete(owner, key_id)
