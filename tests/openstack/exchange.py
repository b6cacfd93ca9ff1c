"""What castellan's own Barbican driver keeps, ours reads, and the other way round. Environment: TOKEN, AUTH_URL."""
import os

from castellan import key_manager
from castellan.tests.functional.key_manager import test_key_manager as samples
from oslo_config import cfg
from oslo_context import context

cfg.CONF([], project='cryptattach-test', default_config_files=[])
cfg.CONF.register_opts(key_manager.key_manager_opts, group='key_manager')


def manager(backend):
    cfg.CONF.set_override('backend', backend, group='key_manager')
    return key_manager.API(cfg.CONF)


ours, theirs = manager('cryptattach'), manager('barbican')
cfg.CONF.set_override('auth_endpoint', os.environ['AUTH_URL'], group='barbican')
user = context.RequestContext(auth_token=os.environ['TOKEN'], project_id=os.environ['PROJECT_ID_KEYS'])
for sample in (samples._get_test_symmetric_key, samples._get_test_private_key, samples._get_test_public_key,
               samples._get_test_certificate, samples._get_test_passphrase, samples._get_test_opaque_data):
    made = sample()
    for writer, reader in ((ours, theirs), (theirs, ours)):
        key_id = writer.store(user, made)
        for read in (writer.get(user, key_id), reader.get(user, key_id)):
            assert isinstance(read, type(made)) and read.get_encoded() == made.get_encoded(), (sample, writer)
        reader.delete(user, key_id)
private, public = ours.create_key_pair(user, 'rsa', 2048)
assert theirs.get(user, private).get_encoded() == ours.get(user, private).get_encoded()
assert theirs.get(user, public).get_encoded() == ours.get(user, public).get_encoded()
assert len(theirs.get(user, ours.create_key(user, 'AES', 512)).get_encoded()) == 64
print('exchanged')
