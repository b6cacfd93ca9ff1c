"""OpenStack's side of cryptattach: an os-brick encryptor and a castellan driver."""

import os
import shutil

from castellan.common import exception
from castellan.key_manager import barbican_key_manager
from keystoneauth1 import loading

REQUEST_VERSION = 1


def command(*verb):
    """The command for a hook; absolute, for it may run in another process with another environment."""
    program = os.environ.get('CRYPTATTACH', 'cryptattach')
    words = [shutil.which(program) or program]
    if 'CRYPTATTACH_CONFIG' in os.environ:
        words += ['--config', os.environ['CRYPTATTACH_CONFIG']]
    return words + ['hook', *verb]


class ServiceUser:
    """The service itself, whose token goes along with its user's if castellan is to send one.

    A user's token may expire during a long operation. Where tokens are checked, one of a service beside it lets that pass. It is
    configured as for castellan's own driver: [barbican] send_service_user_token and [barbican_service_user].
    """

    GROUP = 'barbican_service_user'

    def __init__(self, conf):
        self._conf = conf
        self._session = None

    def token(self):
        """Its token; None if none is to be sent."""
        # Registered again they are the same ones.
        for group, options in barbican_key_manager.BarbicanKeyManager.list_options_for_discovery(None):
            self._conf.register_opts(options, group=group)
        if not self._conf.barbican.send_service_user_token:
            return None
        if self._session is None:
            plugin = loading.load_auth_from_conf_options(self._conf, self.GROUP)
            if plugin is None:
                raise exception.Forbidden('send_service_user_token is set, but [barbican_service_user] does not say who it is')
            self._session = loading.load_session_from_conf_options(self._conf, self.GROUP, auth=plugin)
        return self._session.get_token()


def auth(context, service_user):
    """The caller's token, by which its project is known.

    oslo's RequestContext and castellan's Token and KeystoneToken have one. A context without it is nobody's, and must not be
    served with the rights of the service's own login; castellan's own driver refuses it, too.
    """
    token = getattr(context, 'auth_token', None) or getattr(context, 'token', None)
    if not token:
        raise exception.Forbidden(f'a {type(context).__name__} without a token is not authorized to use keys: cryptattach '
                                  'takes a RequestContext with auth_token, or a Token or KeystoneToken')
    return {'token': token, 'project_id': getattr(context, 'project_id', None), 'service_token': service_user.token()}
