"""castellan_keys.py AUTH_URL BARBICAN_URL PASSWORD KEY ...: has each key from Barbican, as Cinder and Nova do."""
import sys

from castellan import key_manager, options
from castellan.common.credentials import keystone_password
from oslo_config import cfg

auth_url, barbican_url, password, keys = sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4:]
conf = cfg.ConfigOpts()
conf([])
options.set_defaults(conf, backend='barbican', barbican_endpoint=barbican_url, auth_endpoint=auth_url)
context = keystone_password.KeystonePassword(
    password, username='cinder', auth_url=auth_url, user_domain_id='default', project_name='keys', project_domain_id='default')
manager = key_manager.API(conf)
for key in keys:
    manager.get(context, key).get_encoded()
