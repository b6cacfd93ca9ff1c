"""What Cinder does with a key before the volume's first attach: clone, backup, transfer, an image that is begun twice; and what
must not be formatted after that. Environment: TOKEN and PROJECT_ID_KEYS, OTHER_TOKEN and PROJECT_ID_DEMO, AUTH_URL,
PASSWORD_CINDER; DEVICE and BLANK, blank loop devices; NAME of a mapping."""
import os
import subprocess
import types

import os_brick
from castellan import key_manager
from castellan.common import exception
from castellan.common.credentials import keystone_password
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


def service(password):
    """As cinder.keymgr.transfer.KeyTransfer makes it."""
    return keystone_password.KeystonePassword(
        password=password, auth_url=os.environ['AUTH_URL'], username='cinder', user_domain_name='Default',
        project_name='service', project_domain_name='Default')


def new():
    return manager.create_key(owner, algorithm='aes', length=256)


def clone(key_id):
    """cinder.volume.volume_utils.clone_encryption_key"""
    return manager.store(owner, manager.get(owner, key_id))


def transfer(key_id, src, dst):
    """cinder.keymgr.transfer.KeyTransfer.transfer_key"""
    secret = manager.get(src, key_id)
    moved = manager.store(dst, secret)
    manager.delete(src, key_id)
    return moved


def blank(device):
    subprocess.check_call(['dd', 'if=/dev/zero', f'of={device}', 'bs=1M', 'count=64', 'status=none', 'conv=fsync'])


def is_blank(device):
    with open(device, 'rb') as file:
        return not any(file.read(1 << 20))


def attach(user, key_id, device, volume='v'):
    encryption = dict(provider='cryptattach_openstack.encryptor.CryptattachEncryptor', control_location='front-end',
                      cipher='aes-xts-plain64', key_size=256, encryption_key_id=key_id)
    info = {'driver_volume_type': 'local', 'serial': volume, 'data': {'device_path': device, 'volume_id': volume}}
    made = encryptors.get_volume_encryptor(root_helper='env', keymgr=manager, connection_info=info, **encryption)
    made.dev_name, made.symlink_path = os.environ['NAME'], '/dev/disk/by-id/' + os.environ['NAME']
    made.attach_volume(user, **encryption)
    made.detach_volume(**encryption)


# A module of that name, for a function of Cinder's.
cinder = types.ModuleType('cinder.volume.driver')
exec('def copy_image_to_encrypted_volume(attach, *what):\n    attach(*what)', cinder.__dict__)


def fill(user, key_id, device, volume='v'):
    cinder.copy_image_to_encrypted_volume(attach, user, key_id, device, volume)


def refused(user, key_id, by=attach):
    """A wrong LUN: a blank device in place of the volume."""
    blank(wrong)
    try:
        by(user, key_id, wrong)
    except processutils.ProcessExecutionError as error:
        assert error.exit_code == 73, error
        assert is_blank(wrong)
        return error.stderr.strip()
    raise SystemExit(f'{key_id} formatted a blank device')


os.makedirs('/dev/disk/by-id', exist_ok=True)
device, wrong = os.environ['DEVICE'], os.environ['BLANK']

key = new()
copies = [clone(key) for _ in range(2)]
copies.append(clone(copies[0]))
try:
    transfer(key, owner, service('wrong'))
    raise SystemExit('somebody logged in with a wrong password')
except exception.Forbidden as error:
    assert 'refuses the log-in of cinder' in str(error) and '401' in str(error), error
    print('transfer that fails ->', error)
theirs = transfer(transfer(clone(key), owner, service(os.environ['PASSWORD_CINDER'])),
                  service(os.environ['PASSWORD_CINDER']), other)
for user, key_id in [(owner, key), *((owner, copy) for copy in copies), (other, theirs)]:
    blank(device)
    attach(user, key_id, device)
    assert not is_blank(device)
    attach(user, key_id, device)
    print('wrong LUN ->', refused(user, key_id).splitlines()[0])
try:
    manager.get(owner, theirs)
    raise SystemExit('it was given away and is still here')
except (exception.ManagedObjectNotFoundError, exception.Forbidden):
    print('transferred')

# Nova's QEMU and stock os-brick get a key's value, and may format with it; so may who has a copy of such.
taken = new()
before = clone(taken)
got = manager.get(owner, taken)
assert len(got.get_encoded()) == 32 and got.bit_length == 256
after = clone(taken)
assert manager.get(owner, before) == got == manager.get(owner, after)
for key_id in (taken, after, before, manager.store(owner, got)):
    refused(owner, key_id)
print('a value that was looked at formats nothing')

# The first try of a volume from an image fails past the format; Cinder begins again with another device.
key = new()
for _ in range(2):
    blank(device)
    fill(owner, key, device)
refused(owner, key)
refused(owner, key, lambda *what: fill(*what, volume='another'))
blank(device)
fill(owner, key, device)
attach(owner, key, device)
refused(owner, key, fill)
attach(owner, key, device)
print('an image is begun again until the volume is attached')
