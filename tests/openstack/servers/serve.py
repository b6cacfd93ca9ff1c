"""serve.py MODULE HOST PORT: one WSGI application in one process, one thread (sqlite: two threads can end in "database is locked"). Keystone parses sys.argv, so the list is emptied
before it is imported (under gunicorn it dies with 'unrecognized arguments: -b ...')."""
import importlib, sys
mod, host, port = sys.argv[1:4]
sys.argv = [mod]
app = importlib.import_module(mod).application
import waitress
# Its stock limit is 100 connections: a hundred clients that keep one open would keep all others out for two minutes.
waitress.serve(app, host=host, port=int(port), threads=1, ident=None, connection_limit=10000, backlog=4096, asyncore_use_poll=True)
