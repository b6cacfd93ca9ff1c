"""OpenStack's side of cryptattach: an os-brick encryptor and a castellan driver."""

import os
import shutil

from castellan.common.credentials import keystone_password
from castellan.common import exception
from castellan.key_manager import barbican_key_manager
from keystoneauth1 import exceptions as keystone_exceptions
from keystoneauth1 import identity
from keystoneauth1 import loading
from keystoneauth1 import session

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

    def _barbican(self):
        # Registered again they are the same ones.
        for group, options in barbican_key_manager.BarbicanKeyManager.list_options_for_discovery(None):
            self._conf.register_opts(options, group=group)
        return self._conf.barbican

    def verify(self):
        """How certificates are checked, as requests takes it."""
        barbican = self._barbican()
        return barbican.verify_ssl and (barbican.verify_ssl_path or True)

    def token(self):
        """Its token; None if none is to be sent."""
        if not self._barbican().send_service_user_token:
            return None
        if self._session is None:
            plugin = loading.load_auth_from_conf_options(self._conf, self.GROUP)
            if plugin is None:
                raise exception.Forbidden('send_service_user_token is set, but [barbican_service_user] does not say who it is')
            self._session = loading.load_session_from_conf_options(self._conf, self.GROUP, auth=plugin)
        return self._session.get_token()


# What castellan's own driver hands to Keystone, too.
LOGIN = ('auth_url', 'username', 'password', 'user_id', 'user_domain_id', 'user_domain_name', 'trust_id', 'domain_id',
         'domain_name', 'project_id', 'project_name', 'project_domain_id', 'project_domain_name')


def log_in(password, verify):
    """The token that a password gets, and its project: Cinder transfers a volume's key with its own log-in."""
    if not password.auth_url:
        raise exception.Forbidden('the KeystonePassword does not say where to log in (auth_url)')
    who = f'the log-in of {password.username or password.user_id} at {password.auth_url}'
    plugin = identity.Password(**{name: getattr(password, name) for name in LOGIN})
    keystone = session.Session(auth=plugin, verify=verify)
    try:
        return keystone.get_token(), keystone.get_project_id()
    except keystone_exceptions.HttpError as error:
        if error.http_status in (401, 403):
            raise exception.Forbidden(f'Keystone refuses {who} ({error.http_status}): check the user, project and password '
                                      'that the service gives castellan, [keystone_authtoken] in the case of Cinder')
        raise exception.KeyManagerError(reason=f'Keystone cannot serve {who}: {error}')
    except keystone_exceptions.ClientException as error:
        raise exception.KeyManagerError(reason=f'cannot ask for {who}: {error}')


def auth(context, service_user):
    """The caller's token, by which its project is known.

    oslo's RequestContext and castellan's Token and KeystoneToken have one, and a KeystonePassword gets one. A context without it
    is nobody's, and must not be served with the rights of the service's own login; castellan's own driver refuses it, too.
    """
    if isinstance(context, keystone_password.KeystonePassword):
        token, project_id = log_in(context, service_user.verify())
    else:
        token = getattr(context, 'auth_token', None) or getattr(context, 'token', None)
        project_id = getattr(context, 'project_id', None)
    if not token:
        raise exception.Forbidden(f'a {type(context).__name__} without a token is not authorized to use keys: cryptattach takes '
                                  'a RequestContext with auth_token, a Token, a KeystoneToken or a KeystonePassword')
    return {'token': token, 'project_id': project_id, 'service_token': service_user.token()}
