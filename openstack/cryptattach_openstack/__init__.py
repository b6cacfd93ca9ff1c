"""OpenStack's side of cryptattach: an os-brick encryptor and a castellan driver."""

import os
import shutil

from castellan.common import exception

REQUEST_VERSION = 1


def command(*verb):
    """The command for a hook; absolute, for it may run in another process with another environment."""
    program = os.environ.get('CRYPTATTACH', 'cryptattach')
    words = [shutil.which(program) or program]
    if 'CRYPTATTACH_CONFIG' in os.environ:
        words += ['--config', os.environ['CRYPTATTACH_CONFIG']]
    return words + ['hook', *verb]


def auth(context):
    """The caller's token, for stores that are used as the caller.

    oslo's RequestContext and castellan's Token and KeystoneToken have one. A context without it is nobody's, and must not be
    served with the rights of the service's own login; castellan's own driver refuses it, too.
    """
    token = getattr(context, 'auth_token', None) or getattr(context, 'token', None)
    if not token:
        raise exception.Forbidden(f'a {type(context).__name__} without a token is not authorized to use keys: cryptattach '
                                  'takes a RequestContext with auth_token, or a Token or KeystoneToken')
    return {'token': token, 'project_id': getattr(context, 'project_id', None)}
