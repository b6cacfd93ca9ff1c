"""Volumes as stock os-brick makes them: its LuksEncryptor and Luks2Encryptor, a key in Barbican by castellan's own driver,
real cryptsetup. Without a device-mapper only the mapping itself is left out: luksOpen is `cryptsetup open --test-passphrase`.

    stock.py make FILE     prints {"luks": KEY_ID, "luks2": KEY_ID}; the volumes are FILE.luks and FILE.luks2
    stock.py open FILE KEY_ID      opens a volume with stock os-brick, the key through castellan's [key_manager] backend $BACKEND

Environment: AUTH_URL, PASSWORD_CINDER, TOKEN.
"""
import json
import os
import sys

import oslo_config.cfg as cfg
from castellan import key_manager
from castellan.common.credentials import keystone_password
from os_brick import encryptors
from os_brick import privileged
from os_brick.privileged import rootwrap
from oslo_context import context

cfg.CONF([], project='cryptattach-test', default_config_files=[])
privileged.default.set_client_mode(False)
cfg.CONF.register_opts(key_manager.key_manager_opts, group='key_manager')
cfg.CONF.set_override('backend', os.environ.get('BACKEND', 'barbican'), group='key_manager')
manager = key_manager.API(cfg.CONF)
if os.environ.get('BACKEND', 'barbican') == 'barbican':
    cfg.CONF.set_override('auth_endpoint', os.environ['AUTH_URL'], group='barbican')
if os.environ.get('BACKEND') == 'cryptattach':
    user = context.RequestContext(auth_token=os.environ['TOKEN'], project_id='keys')
else:
    user = keystone_password.KeystonePassword(
        auth_url=os.environ['AUTH_URL'], username='cinder', password=os.environ['PASSWORD_CINDER'],
        user_domain_id='default', project_name='keys', project_domain_id='default')


def execute(*command, **options):
    command = [str(word) for word in command]
    if command[:2] == ['cryptsetup', 'luksOpen']:
        command = ['cryptsetup', 'open', '--test-passphrase', '--key-file=-', command[3]]
    elif command[0] == 'ln':
        return '', ''
    return rootwrap.execute(*command, **options)


def attach(provider, path, key_id):
    encryption = dict(provider=provider, control_location='front-end', cipher='aes-xts-plain64', key_size=256,
                      encryption_key_id=key_id)
    info = {'driver_volume_type': 'iscsi', 'serial': 'v', 'data': {'volume_id': 'v', 'device_path': path}}
    encryptor = encryptors.get_volume_encryptor(
        root_helper='env', keymgr=manager, connection_info=info, execute=execute, **encryption)
    encryptor.attach_volume(user, **encryption)


if sys.argv[1] == 'make':
    made = {}
    for provider in ('luks', 'luks2'):
        path = f'{sys.argv[2]}.{provider}'
        with open(path, 'wb') as file:
            file.truncate(64 << 20)
        made[provider] = manager.create_key(user, algorithm='aes', length=256)
        attach(provider, path, made[provider])
    print(json.dumps(made))
else:
    before = open(sys.argv[2], 'rb').read(1 << 20)
    attach('luks2', sys.argv[2], sys.argv[3])
    assert open(sys.argv[2], 'rb').read(1 << 20) == before, 'os-brick formatted it instead'
    print('opened')
