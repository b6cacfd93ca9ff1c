"""OpenStack's side of cryptattach: an os-brick encryptor and a castellan driver."""

import os
import shutil

REQUEST_VERSION = 1


def command(*verb):
    """The command for a hook; absolute, for it may run in another process with another environment."""
    program = os.environ.get('CRYPTATTACH', 'cryptattach')
    words = [shutil.which(program) or program]
    if 'CRYPTATTACH_CONFIG' in os.environ:
        words += ['--config', os.environ['CRYPTATTACH_CONFIG']]
    return words + ['hook', *verb]


def auth(context):
    """The caller's token, for stores that are used as the caller."""
    token = getattr(context, 'auth_token', None)
    return {'token': token, 'project_id': getattr(context, 'project_id', None)} if token else None
