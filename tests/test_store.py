"Several writers, a killed writer, a full disk, a read-only folder, schema versions: what the page of the store cannot show"
import os,pickle,signal,sqlite3,subprocess,sys,textwrap
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np, pytest

import merginguriel.store as module
from merginguriel.core import StoreError,MissingDataError,config_hash
from merginguriel.store import Store

def score(i=0, name='m', value=None, **kw):
    c = np.random.default_rng(i).random(50)<.7
    return dict(name=name, locale='sq-AL', split='test', metric='accuracy', value=c.mean() if value is None else value,
        correct=c if value is None else None, ids=list(range(50)) if value is None else None) | kw

def script(code, *args, **kw):
    code = 'import sys,os,signal\nfrom pathlib import Path\nimport numpy as np\nimport merginguriel.store as module\n' \
        'from merginguriel.store import Store\n' + textwrap.dedent(code)
    return subprocess.Popen([sys.executable, '-c', code, *map(str, args)], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **kw)

def ok(p):
    out,err = p.communicate(timeout=120)
    assert p.returncode==0, err
    return out

def whole(path):
    "The store passes SQLite's own checks"
    con = sqlite3.connect(path)
    try:
        assert con.execute('pragma integrity_check').fetchall()==[('ok',)]
        assert con.execute('pragma foreign_key_check').fetchall()==[]
    finally: con.close()

writer = """
    path,who = sys.argv[1:]
    s = Store(path) # all four also race to create the file
    for i in range(50):
        c = np.random.default_rng(i).random(50)<.7
        s.record(dict(writer=who, i=i), [dict(name='m', locale='sq-AL', split='test', metric='accuracy', value=c.mean(),
            correct=c, ids=list(range(50)))])
"""

def test_four_writers(tmp_path):
    path = tmp_path/'s.db'
    for p in [script(writer, path, i) for i in range(4)]: ok(p)
    df = Store(path).scores()
    assert len(df)==200 and df.hash.nunique()==200
    assert sorted(zip(df.writer, df.i))==sorted((str(w),i) for w in range(4) for i in range(50))
    assert df['items'].nunique()==1
    whole(path)

def test_writers_of_the_same_run_leave_one_row(tmp_path):
    path = tmp_path/'s.db'
    for p in [script(writer, path, 'one') for _ in range(3)]: ok(p)
    assert len(Store(path).scores())==50

def test_threads_share_a_store(tmp_path):
    s = Store(tmp_path/'s.db')
    with ThreadPoolExecutor(4) as ex: list(ex.map(lambda i: s.record(dict(i=i), [score(i)]), range(40)))
    assert len(s.scores())==40
    assert len(pickle.loads(pickle.dumps(s)).scores())==40

def test_many_may_be_the_first(tmp_path):
    "Whoever opens a file that another is making sees a store, and no foreign file"
    with ThreadPoolExecutor(8) as pool:
        for i in range(60): list(pool.map(lambda _: Store(tmp_path/f'{i}.sqlite').scores(), range(8)))

def test_a_lock_that_stays_is_reported(tmp_path):
    s = Store(tmp_path/'s.db', timeout=.3)
    con = sqlite3.connect(s.path, isolation_level=None)
    con.execute('begin immediate')
    with pytest.raises(StoreError, match='locked by another process'): s.record(dict(i=1), [score()])
    assert len(s.scores())==0 # readers are not blocked
    con.execute('rollback'); con.close()
    s.record(dict(i=1), [score()])

def test_writer_killed_inside_a_transaction(tmp_path):
    path = tmp_path/'s.db'
    Store(path).record(dict(i=0), [score()])
    p = script("""
        s,real,done = Store(sys.argv[1]),Store._put,[]
        def put(self, con, *args):
            real(self, con, *args)
            done.append(1)
            if len(done)==5: os.kill(os.getpid(), signal.SIGKILL)
        Store._put = put
        s.record(dict(i=1), [dict(name=f'm{j}', locale='x', split='test', metric='accuracy', value=.5) for j in range(9)])
    """, path)
    p.communicate(timeout=120)
    assert p.returncode==-signal.SIGKILL
    s = Store(path)
    assert len(s.scores())==1 and len(s.configs())==1 and not s.has(dict(i=1))
    whole(path)
    s.record(dict(i=1), [score(j, name=f'm{j}') for j in range(9)])
    assert len(s.scores())==10

def test_writer_killed_at_any_moment(tmp_path):
    path = tmp_path/'s.db'
    for wait in (0, .03, .11):
        p = script("""
            s = Store(sys.argv[1])
            print('ready', flush=True)
            for i in range(100000):
                s.record(dict(pid=os.getpid(), i=i), [dict(name=f'm{j}', locale='x', split='test', metric='accuracy', value=.5)
                    for j in range(30)])
        """, path)
        p.stdout.readline()
        try: p.wait(wait or .001)
        except subprocess.TimeoutExpired: p.kill()
        p.communicate(timeout=60)
        n = Store(path).scores().groupby('hash').size()
        assert (n==30).all() and len(n)==len(Store(path).configs())
        whole(path)
    assert len(n)>0

# ---- full disk

def test_full_disk_keeps_earlier_rows(tmp_path, monkeypatch):
    s = Store(tmp_path/'s.db')
    h = s.record(dict(i=0), [score()])
    before = s.scores()
    real = Store._connect
    @contextmanager
    def small(self, *args):
        with real(self, *args) as con:
            con.execute(f"pragma max_page_count={con.execute('pragma page_count').fetchone()[0]+2}")
            yield con
    big = [score(j, name=f'm{j}', ids=[f'item {j} {k}' for k in range(50)]) for j in range(200)]
    with monkeypatch.context() as m:
        m.setattr(Store, '_connect', small)
        with pytest.raises(StoreError, match='disk is full.*earlier rows are intact'): s.record(dict(i=1), big)
        assert s.scores().equals(before) and not s.has(dict(i=1))
    assert s.correct(h, 'm', 'sq-AL', 'test').sum()==score()['correct'].sum()
    whole(s.path)
    s.record(dict(i=1), big) # after space was made
    assert len(s.scores())==201

def test_file_size_limit(tmp_path):
    "The kernel's own refusal to let the file grow (quota) reads as an I/O error"
    path = tmp_path/'s.db'
    Store(path).record(dict(i=0), [score()])
    p = script("""
        from merginguriel.core import StoreError
        import resource
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        s = Store(sys.argv[1])
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
        try: s.record(dict(i=1), [dict(name=f'm{j}'*100, locale='x', split='test', metric='accuracy', value=.5) for j in range(2000)])
        except StoreError as e: print(e)
    """, path)
    out = ok(p)
    assert 'nothing of this record was kept' in out
    assert len(Store(path).scores())==1
    whole(path)

# ---- places and files that are not stores

def test_read_only_folder(tmp_path):
    folder = tmp_path/'shared'
    s = Store(folder/'s.db')
    s.record(dict(i=0), [score()])
    s.path.chmod(0o444); folder.chmod(0o555)
    mine = [p for p in folder.parents if p.stat().st_uid==os.geteuid() and not p.stat().st_mode & 0o001]
    modes = {p:p.stat().st_mode & 0o7777 for p in mine}
    try:
        for p in mine: p.chmod(modes[p] | 0o055)
        out = ok(script("""
            from merginguriel.core import StoreError
            late = dict(name='m', locale='x', split='s', metric='m', value=1)
            Store(sys.argv[2]).record(dict(i=0), [late]) # imports what is imported late
            if not os.geteuid(): os.setgroups([]); os.setgid(65534); os.setuid(65534) # root may write everywhere
            p = Path(sys.argv[1])
            for f in (p, p.with_name('new.db'), p.parent/'sub'/'new.db'):
                try: Store(f); print('opened', f)
                except StoreError as e: print('refused', e)
            print(len(Store(p, readonly=True).scores()), Store(p, readonly=True).has(dict(i=0)))
        """, s.path, tmp_path/'mine.db'))
    finally:
        for p,m in modes.items(): p.chmod(m)
        folder.chmod(0o755); s.path.chmod(0o644)
    assert [o.split()[0] for o in out.splitlines()]==['refused']*3+['1'] and out.count('readonly=True')==1, out
    assert out.splitlines()[-1]=='1 True'
    assert sorted(p.name for p in folder.iterdir())==['s.db']

def test_readonly_sees_what_is_being_written(tmp_path):
    s = Store(tmp_path/'s.db')
    r = Store(s.path, readonly=True)
    s.record(dict(i=0), [score()])
    assert len(r.scores())==1
    with pytest.raises(StoreError, match='for reading'): r.record(dict(i=1), [score()])

@pytest.mark.parametrize('content', [b'name,value\na,1\n'*100, b'SQLite format 3\0'+b'x'*5000])
def test_not_a_store(tmp_path, content):
    (tmp_path/'s.db').write_bytes(content)
    with pytest.raises(StoreError, match='not an SQLite file|damaged'): Store(tmp_path/'s.db')
    assert (tmp_path/'s.db').read_bytes()==content

def test_damaged(tmp_path):
    s = Store(tmp_path/'s.db')
    for i in range(20): s.record(dict(i=i), [score(i)])
    b = bytearray(s.path.read_bytes())
    b[4096:] = os.urandom(len(b)-4096)
    s.path.write_bytes(b)
    with pytest.raises(StoreError, match='damaged'): s.scores()

def test_removed_while_open(tmp_path):
    s = Store(tmp_path/'s.db')
    s.path.unlink()
    with pytest.raises(StoreError, match='cannot be opened'): s.record(dict(i=0), [score()])
    assert not s.path.exists() # not silently begun again

def test_in_memory_and_odd_names(tmp_path):
    with pytest.raises(StoreError, match='a store is a file'): Store(':memory:')
    s = Store(tmp_path/'a ?#%20é'/'s.db') # made with its folder
    s.record(dict(i=0), [score()])
    assert s.path.exists() and len(Store(s.path).scores())==1
    (tmp_path/'empty.db').touch()
    assert len(Store(tmp_path/'empty.db').scores())==0

def test_relative_path_survives_chdir(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    s = Store('s.db')
    (tmp_path/'sub').mkdir()
    monkeypatch.chdir(tmp_path/'sub')
    s.record(dict(i=0), [score()])
    assert (tmp_path/'s.db').exists() and not list((tmp_path/'sub').iterdir())

# ---- schema

def test_older_is_upgraded_and_newer_refused(tmp_path, monkeypatch):
    s = Store(tmp_path/'s.db')
    s.record(dict(i=0), [score()])
    before = s.scores()
    with monkeypatch.context() as m:
        m.setattr(module, '_steps', [*module._steps, ['alter table scores add column note text']])
        with pytest.raises(StoreError, match='version 1 of 2; open it once for writing'): Store(s.path, readonly=True)
        new = Store(s.path)
        assert new.scores().equals(before)
        new.record(dict(i=1), [score()])
    with pytest.raises(StoreError, match='schema version 2 and this merginguriel knows 1; upgrade'): Store(s.path)
    with pytest.raises(StoreError, match='upgrade'): s.record(dict(i=2), [score()]) # upgraded under an open store
    with pytest.raises(StoreError, match='upgrade'): s.scores()

def test_failed_upgrade_changes_nothing(tmp_path, monkeypatch):
    s = Store(tmp_path/'s.db')
    s.record(dict(i=0), [score()])
    with monkeypatch.context() as m:
        m.setattr(module, '_steps', [*module._steps, ['alter table scores add column note text', 'alter table nowhere add column x']])
        with pytest.raises(StoreError, match='nowhere'): Store(s.path)
    assert len(Store(s.path).scores())==1
    con = sqlite3.connect(s.path)
    assert con.execute('pragma user_version').fetchone()==(1,)
    con.close()

# ---- rows

def test_recording_again(tmp_path):
    s = Store(tmp_path/'s.db')
    config = dict(target='sq-AL', k=5)
    rows = [score(0, 'a'), score(1, 'b')]
    h = s.record(config, rows)
    first = s.scores()
    assert s.record(dict(k=5, target='sq-AL'), rows)==h==config_hash(config)
    assert s.scores().equals(first)
    assert len(s.scores(hash=s.record(config, [score(2, 'c')])))==3 # a new score of the same run is added
    for change in (dict(value=.5, correct=None, ids=None), dict(low=.1, high=.9), dict(ids=list(range(1,51)))):
        with pytest.raises(StoreError, match='is stored with'): s.record(config, [score(9, 'd'), score(0, 'a')|change])
    flipped = score(0, 'a')['correct'][::-1].copy()
    assert flipped.mean()==rows[0]['value'] and (flipped!=rows[0]['correct']).any()
    with pytest.raises(StoreError, match='other correct'): s.record(config, [score(0, 'a')|dict(correct=flipped)])
    assert len(s.scores())==3 and (s.correct(h,'a','sq-AL','test')==rows[0]['correct']).all()
    s.record(config, [score(0, 'a')|dict(correct=flipped)], replace=True)
    assert len(s.scores())==3 and (s.correct(h,'a','sq-AL','test')==flipped).all()

@pytest.mark.parametrize('bad', [dict(value=float('nan')), dict(value=None), dict(value=float('-inf')), dict(low=float('nan'), high=.9)])
def test_nothing_of_a_call_with_a_bad_score_is_kept(tmp_path, bad):
    s = Store(tmp_path/'s.db')
    with pytest.raises(StoreError, match='evaluate again'): s.record(dict(i=0), [score(), score(1,'b')|dict(correct=None,ids=None)|bad])
    r = score(value=.5); del r['value']
    with pytest.raises(StoreError, match='value of m/sq-AL/test/accuracy is None'): s.record(dict(i=0), [r])
    with pytest.raises(ValueError, match='finite'): s.record(dict(lr=float('nan')), [score()])
    assert len(s.scores())==0 and len(s.configs())==0

def test_hash_clash(tmp_path, monkeypatch):
    s = Store(tmp_path/'s.db')
    monkeypatch.setattr(module, 'config_hash', lambda c: 'same')
    s.record(dict(i=0), [score()])
    with pytest.raises(StoreError, match='two configurations have the hash same'): s.record(dict(i=1), [score()])
    assert s.configs().i.tolist()==[0]

@pytest.mark.parametrize('n', [1, 7, 8, 9, 2974])
def test_items_round_trip(tmp_path, n):
    s = Store(tmp_path/'s.db')
    c = np.random.default_rng(n).random(n)<.6
    ids = [f'ü{i}' for i in np.random.default_rng(0).permutation(n)]
    h = s.record(dict(n=n), [dict(name='m', locale='x', split='test', metric='accuracy', value=c.mean(), correct=c, ids=ids)])
    back = s.correct(h, 'm', 'x', 'test', by_id=True)
    assert back.index.tolist()==ids and (back.to_numpy()==c).all()
    assert s.scores().value[0]==c.mean() and s.scores().n[0]==n
    with pytest.raises(MissingDataError): s.correct(h, 'm', 'x', 'dev')
