"""An os-brick encryptor that has cryptattach map the volume."""

import json
import sys

from os_brick.encryptors import cryptsetup
from oslo_config import cfg

import cryptattach_openstack


# Cinder's function, of all its drivers, that fills a whole volume with an image.
FILLS = 'copy_image_to_encrypted_volume'


def fills():
    """Whether Cinder attaches a volume to fill it with an image.

    It does not say what it attaches a volume for. If it fails on the way, it begins again with another blank device and the same
    key. Where its function is not found, a second beginning is refused.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == FILLS and frame.f_globals.get('__name__', '').startswith('cinder.'):
            return True
        frame = frame.f_back
    return False


class CryptattachEncryptor(cryptsetup.CryptsetupEncryptor):
    """Maps volumes with cryptattach, under the names and links of os-brick's own encryptors."""

    def __init__(self, root_helper, connection_info, keymgr, execute=None, *args, **kwargs):
        super().__init__(root_helper, connection_info, keymgr, execute, *args, **kwargs)
        self._connection_info = connection_info
        self._service_user = cryptattach_openstack.ServiceUser(cfg.CONF)

    def _hook(self, verb, auth=None, **kwargs):
        data = self._connection_info['data']
        request = {
            'version': cryptattach_openstack.REQUEST_VERSION,
            'volume_id': data.get('volume_id') or self._connection_info.get('serial'),
            'fills': fills(),
            'device': self.dev_path,
            'link': self.symlink_path,
            'name': self.dev_name,
            'key_id': self.encryption_key_id,
            'provider': kwargs.get('provider'),
            'cipher': kwargs.get('cipher'),
            'key_size': kwargs.get('key_size'),
            'connection_info': self._connection_info,
            'auth': auth,
        }
        out, _ = self._execute(*cryptattach_openstack.command(verb), process_input=json.dumps(request, default=str),
                               run_as_root=True, root_helper=self._root_helper, check_exit_code=True)
        return json.loads(out)

    def attach_volume(self, context, **kwargs):
        """Map the volume and make its link lead to the mapping."""
        self._hook('attach', cryptattach_openstack.auth(context, self._service_user), **kwargs)

    def detach_volume(self, **kwargs):
        """Remove the mapping, if there is one."""
        self._hook('detach', **kwargs)

    def extend_volume(self, context, **kwargs):
        """Make the mapping as large as the volume; return its size in bytes."""
        return self._hook('extend', cryptattach_openstack.auth(context, self._service_user), **kwargs)['size_bytes']
