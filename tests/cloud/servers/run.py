"""run.py NAME MODULE:FUNCTION ARGUMENTS     a server by its main function
   run.py NAME MODULE PORT ARGUMENTS         a WSGI application, on 127.0.0.1"""
import importlib
import sys

name, program, *arguments = sys.argv[1:]
module, _, function = program.partition(':')
port = None if function else int(arguments.pop(0))
sys.argv = [name, *arguments]
# First the module: it may patch Python's threads.
module = importlib.import_module(module)
if name in ('nova-compute', 'cinder-volume', 'cinder-backup'):
    import loop_connector
    loop_connector.put_in_place()
if function:
    sys.exit(getattr(module, function)())
import waitress  # noqa: E402

# A volume's backup and an image are longer than waitress' limit, 1 GiB.
waitress.serve(module.application, host='127.0.0.1', port=port, threads=4, ident=None, max_request_body_size=1 << 36)
