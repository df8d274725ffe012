"""Data: splits by template, the same rows for the same seed, readers that keep what is written, errors that say what was seen."""
import json,os,subprocess,sys
import numpy as np
import pandas as pd
import pytest
from merginguriel.core import MissingDataError,cache_dir
from merginguriel.data import *
from merginguriel.home import *
from merginguriel.locales import study_locales

@pytest.fixture(scope='module', autouse=True)
def home_cache(tmp_path_factory):
    "One cache for the module, so that a locale is built once"
    old = os.environ.get('MERGINGURIEL_CACHE')
    os.environ['MERGINGURIEL_CACHE'] = str(tmp_path_factory.mktemp('cache'))
    yield
    if old is None: del os.environ['MERGINGURIEL_CACHE']
    else: os.environ['MERGINGURIEL_CACHE'] = old

@pytest.fixture
def no_massive(monkeypatch): monkeypatch.delenv('MERGINGURIEL_MASSIVE', raising=False)

built = ['cy-GB','fa-IR','ko-KR','vi-VN'] # many and few templates, three scripts

# home

def test_home_has_thirty_locales():
    assert len(home_locales())>=30 and set(home_locales())<=set(study_locales) and home_locales()==sorted(home_locales())
    assert available_locales('home')==home_locales()

def test_every_locale_deals_every_intent_a_template_per_split():
    for o in home_locales():
        for l in home_labels:
            deal = home_deal(o,l)
            ts = [t for v in deal.values() for t in v]
            assert min(map(len,deal.values()))>=1, (o,l)
            assert sorted(ts)==sorted(home_templates(o,l)) and len(set(ts))==len(ts), (o,l)

@pytest.mark.parametrize('locale', built)
@pytest.mark.parametrize('seed', [0,1])
def test_no_template_and_no_text_in_two_splits(locale, seed):
    rows = {s:home_rows(locale,s,seed) for s in home_splits}
    for key in (lambda o: o['id'].split('-')[0], lambda o: o['text'].casefold(), lambda o: o['id']):
        seen = {s:{key(o) for o in v} for s,v in rows.items()}
        assert len(set.union(*seen.values()))==sum(map(len,seen.values()))
    for s,v in rows.items():
        assert {o['label'] for o in v}==set(home_labels)
        assert len({o['text'].casefold() for o in v})==len(v)<=home_splits[s]
        assert all(o['text']==' '.join(o['text'].split()) and not set('{}<>[]|')&set(o['text']) for o in v)

@pytest.mark.parametrize('locale', built)
def test_rows_come_from_the_templates_of_their_split(locale):
    from merginguriel.core import config_hash
    for s in home_splits:
        allowed = {config_hash(t,8):l for l in home_labels for t in home_deal(locale,l)[s]}
        assert all(allowed[o['id'].split('-')[0]]==o['label'] for o in home_rows(locale,s))

def test_same_rows_in_another_process_order_and_hash_seed(tmp_path):
    code = ("import json,sys; from merginguriel.home import *\n"
        "print(json.dumps({o:[home_rows(o,s) for s in ('test','train')] for o in ('ko-KR','fa-IR')}))")
    env = os.environ | {'MERGINGURIEL_CACHE':str(tmp_path), 'PYTHONHASHSEED':'7'}
    out = json.loads(subprocess.run([sys.executable,'-c',code], env=env, capture_output=True, text=True, check=True).stdout)
    for o in ('fa-IR','ko-KR'): assert out[o]==[home_rows(o,s) for s in ('test','train')]

def test_label_order_does_not_matter_and_seed_does():
    assert home_rows('fa-IR','test',labels=home_labels[::-1])==home_rows('fa-IR','test')
    assert home_rows('fa-IR','test',seed=1)!=home_rows('fa-IR','test')
    few = home_rows('fa-IR','test',labels=['HassTurnOn','HassTurnOff'])
    assert {o['label'] for o in few}=={'HassTurnOn','HassTurnOff'}

@pytest.mark.parametrize('damage', [lambda b: b[:len(b)//2], lambda b: b'', lambda b: b'[]', lambda b: b'\xff'+b,
    lambda b: b.replace('تایمر'.encode(),'x'.encode())])
def test_damaged_cache_is_rebuilt(damage):
    rows = home_rows('fa-IR','test')
    files = list(cache_dir('home').glob('fa-IR-*.json'))
    before = {p:p.read_bytes() for p in files}
    for p in files: p.write_bytes(damage(p.read_bytes()))
    assert home_rows('fa-IR','test')==rows
    assert any(p.read_bytes()==before[p] for p in files)
    for p,b in before.items(): p.write_bytes(b)

def test_cache_key_has_versions(monkeypatch):
    import merginguriel.home as home
    home_rows('fa-IR','dev')
    n = len(list(cache_dir('home').glob('fa-IR-*')))
    monkeypatch.setattr(home, 'version', lambda o: '0')
    home_rows('fa-IR','dev')
    assert len(list(cache_dir('home').glob('fa-IR-*')))==n+1

def test_home_dataset():
    a,b = load_intents('home','cy-GB','train'),load_intents('home','vi-VN','test')
    assert label_names(a)==label_names(b)==sorted(home_labels)
    assert a.info.license=='CC BY 4.0' and 'Home Assistant' in a.info.citation
    assert len(a)>=400 and len(b)>=250
    counts = np.bincount(b['label'])
    assert len(counts)==9 and counts.min()>=20

@pytest.mark.parametrize('locale,error,words', [('sw-KE',MissingDataError,'fewer than three templates'),
    ('sv-SE',MissingDataError,'study'), ('cy-BG',ValueError,'cy-GB'), (False,ValueError,'papermill')])
def test_home_locale_without_data(locale, error, words):
    with pytest.raises(error, match=words): load_intents('home',locale,'test')

# toy

def test_toy_shares_ids_and_labels():
    a,b = load_intents('toy','en-US','test'),load_intents('toy','sw-KE','test')
    assert a['id'][:]==b['id'][:] and a['label'][:]==b['label'][:] and label_names(a)==['lights','music']
    with pytest.raises(ValueError, match='toy'): load_intents('toy','cy-GB','test')

# files

rows = [dict(id=i, text=t, label=l, locale='sq-AL', split=s) for i,(t,l,s) in enumerate([('none','NA','train'),('NA','null','train'),
    ('null','none','train'),('nan','007','train'),('true','1.0','train'),('2024-01-01','NA','validation'),('12','none','test')])]

def write(path, rows):
    df = pd.DataFrame(rows)
    if path.suffix=='.csv': df.to_csv(path, index=False)
    if path.suffix=='.tsv': df.to_csv(path, index=False, sep='\t')
    if path.suffix=='.parquet': df.to_parquet(path)
    if path.suffix=='.jsonl': path.write_text(''.join(json.dumps(o, ensure_ascii=False)+'\n' for o in rows), encoding='utf-8')
    return path

@pytest.mark.parametrize('suffix', ['.csv','.tsv','.jsonl','.parquet'])
def test_none_stays_text(tmp_path, suffix):
    p = write(tmp_path/f'data{suffix}', rows)
    ds = load_intents(p,'sq-AL','train')
    assert ds['text'][:]==['none','NA','null','nan','true']
    assert [label_names(ds)[i] for i in ds['label']]==['NA','null','none','007','1.0']
    assert label_names(ds)==sorted(['007','1.0','NA','none','null'])==label_names(load_intents(p,'sq-AL','test'))
    assert ds['id'][:]==[0,1,2,3,4]
    assert load_intents(p,'sq-AL','dev')['text'][:]==['2024-01-01'] and load_intents(p,'sq-AL','test')['text'][:]==['12']
    assert available_locales(p)==['sq-AL']

def test_saved_datasets(tmp_path):
    from datasets import DatasetDict
    parts = {s:load_intents('toy','sw-KE',d) for s,d in (('train','train'),('validation','dev'),('test','test'))}
    DatasetDict(parts).save_to_disk(tmp_path/'both')
    parts['train'].save_to_disk(tmp_path/'one')
    for s,d in (('train','train'),('validation','dev')): assert load_intents(tmp_path/'both','sw-KE',d).to_list()==parts[s].to_list()
    got = [load_intents(tmp_path/'one','sw-KE',s) for s in ('train','dev','test')]
    assert sorted(i for o in got for i in o['id'])==parts['train']['id'][:] and min(map(len,got))>0

def test_folders(tmp_path):
    for o in ('cy-GB','sq-AL'):
        (tmp_path/'nested'/o).mkdir(parents=True)
        for s in ('train','valid','test'):
            r = [dict(text=f'{o} {s}', label=f'{o} {s}')]
            write(tmp_path/'nested'/o/f'{s}.csv', r)
            (tmp_path/'flat').mkdir(exist_ok=True)
            write(tmp_path/'flat'/f'{o}_{s}.jsonl', r)
    for kind in ('nested','flat'):
        ds = load_intents(tmp_path/kind,'sq-AL','dev')
        assert ds['text'][:]==['sq-AL valid'] and len(label_names(ds))==6 and available_locales(tmp_path/kind)==['cy-GB','sq-AL']
    (tmp_path/'shards').mkdir()
    for i in range(2): write(tmp_path/'shards'/f'train-0000{i}-of-00002.parquet', [dict(text=f't{i}', label='x')])
    assert load_intents(tmp_path/'shards','sq-AL','train')['id'][:]==[0,1]

def test_rows_without_split_are_dealt_by_text(tmp_path):
    some = [dict(text=f'sentence {i%400}', label='ab'[i%2]) for i in range(500)]
    p = write(tmp_path/'mine.csv', some)
    got = {s:set(load_intents(p,'sq-AL',s)['text']) for s in ('train','dev','test')}
    assert sum(map(len,got.values()))==400 and not got['train']&got['test']
    assert 250<len(got['train'])<310 and 55<len(got['test'])<105
    write(p, some[::-1]+[dict(text='new', label='a')])
    assert all(got[s] <= set(load_intents(p,'sq-AL',s)['text']) for s in got) # the changed file is read again
    assert set(load_intents(p,'sq-AL','test',seed=1)['text'])!=got['test']

@pytest.mark.parametrize('content,words', [
    ('', 'cannot be read'), ('text,label\n', "no rows.*'text', 'label'"), ('words,label\na,b\n', "no column 'text'.*'words', 'label'"),
    ('text,label\na,b\n,c\nd,\n', r'no text, e.g. rows \[2\]'), ('text,label\na,b\nc,\n', r'no label, e.g. rows \[2\]'),
    ('text,label\na,b\nc\n', r'no label, e.g. rows \[2\]'), ('text,label\na,b,c\n', 'more cells'),
    ('text,label\na,b\na,b,c\n', 'cannot be read'), ('text,label,split\na,b,later\n', "'later'"),
    ('text,label,split\na,b,\n', 'no split'), ('id,text,label,split\n1,a,b,train\n1,c,b,train\n', "id '1' twice")])
def test_bad_csv(tmp_path, content, words):
    (tmp_path/'bad.csv').write_text(content)
    with pytest.raises(ValueError, match=words): load_intents(tmp_path/'bad.csv','sq-AL','train')

def test_bad_other(tmp_path, no_massive):
    with pytest.raises(MissingDataError, match='neither'): load_intents(tmp_path/'gone','sq-AL','train')
    (tmp_path/'empty').mkdir()
    with pytest.raises(MissingDataError, match='no .csv'): load_intents(tmp_path/'empty','sq-AL','train')
    for n in ('a','b'): write(tmp_path/'empty'/f'{n}.csv', [dict(text='t', label='l')])
    with pytest.raises(ValueError, match='neither a locale nor a split'): load_intents(tmp_path/'empty','sq-AL','train')
    (tmp_path/'x.parquet').write_bytes(b'PAR1 no parquet')
    with pytest.raises(ValueError, match='cannot be read'): load_intents(tmp_path/'x.parquet','sq-AL','train')
    for text,label,words in ((3,'l','no text'), (None,'l','no text'), ('t',None,'no label'), ('t',1.5,'no label')):
        with pytest.raises(ValueError, match=words): load_intents(write(tmp_path/'x.jsonl',[dict(text=text,label=label)]),'sq-AL','train')
    p = write(tmp_path/'x.jsonl', rows)
    with pytest.raises(ValueError, match='sq-AL'): load_intents(p,'sq-AB','train')
    with pytest.raises(ValueError, match='splits'): load_intents(p,'sq-AL','validation')
    with pytest.raises(ValueError, match='not in `labels`'): load_intents(p,'sq-AL','train',labels=['NA'])
    assert label_names(load_intents(p,'sq-AL','train',labels=['z','NA','null','none','007','1.0']))[-1]=='z'

# MASSIVE

massive = [dict(locale=o, id=str(i), partition=s, scenario='x', intent=l, utt=f'{o} {t}') for o in ('sq-AL','sw-KE')
    for i,(s,l,t) in enumerate([('train','b_b','none'),('train','a_a','1'),('dev','a_a','2'),('test','a_a','3')])]

@pytest.mark.parametrize('kind', ['jsonl','archive','parquet','parquet folder'])
def test_massive_copies(tmp_path, monkeypatch, kind):
    root = tmp_path/'1.1'/'data' if kind=='archive' else tmp_path
    root.mkdir(parents=True, exist_ok=True)
    if kind.startswith('parquet'): root = write(tmp_path/'m.parquet', massive)
    else:
        for o in ('sq-AL','sw-KE'): write(root/f'{o}.jsonl', [r for r in massive if r['locale']==o])
    monkeypatch.setenv('MERGINGURIEL_MASSIVE', str(tmp_path if kind in ('archive','parquet folder') else root))
    a,b = load_intents('massive','sq-AL','train'),load_intents('massive','sw-KE','train')
    assert a['id'][:]==b['id'][:]==[0,1] and a['text'][:]==['sq-AL none','sq-AL 1'] and a['label'][:]==[1,0]
    assert label_names(load_intents('massive','sq-AL','test'))==['a_a','b_b'] and len(load_intents('massive','sq-AL','dev'))==1
    assert available_locales('massive')==['sq-AL','sw-KE'] and a.info.license=='CC BY 4.0'
    assert load_intents(root,'sw-KE','train').to_list()==b.to_list() # as a plain path, by its own column names
    with pytest.raises(MissingDataError, match='sw-KE'): load_intents('massive','th-TH','test')
    with pytest.raises(ValueError, match='did you mean'): load_intents('massive','sw-KX','test')

def test_massive_ambiguous(tmp_path, monkeypatch):
    monkeypatch.setenv('MERGINGURIEL_MASSIVE', str(tmp_path))
    with pytest.raises(MissingDataError, match='0 Parquet files. Set MERGINGURIEL_MASSIVE'): load_intents('massive','sq-AL','train')
    for o in 'ab': write(tmp_path/f'{o}.parquet', massive)
    with pytest.raises(MissingDataError, match='2 Parquet files'): available_locales('massive')

def test_massive_missing(tmp_path, monkeypatch, no_massive):
    import datasets
    def offline(*args, **kw): raise ConnectionError('no route')
    monkeypatch.setattr(datasets, 'load_dataset', offline)
    with pytest.raises(MissingDataError, match='no route.*<locale>.jsonl.*home'): load_intents('massive','sq-AL','test')
    assert len(available_locales('massive'))==52
    monkeypatch.setenv('MERGINGURIEL_MASSIVE', str(tmp_path/'gone'))
    with pytest.raises(MissingDataError, match='not there'): load_intents('massive','sq-AL','test')

def test_massive_from_the_hub(monkeypatch, no_massive):
    import datasets
    from datasets import ClassLabel,Dataset,DatasetDict,Features,Value
    f = Features({o:Value('string') for o in ('id','locale','partition','utt')} | {'intent':ClassLabel(names=['b_b','a_a'])})
    def part(i, p):
        row = dict(id=str(i), locale='tl-PH', partition=p, intent=i%2, utt=f'none {i}')
        return Dataset.from_list([row], features=f)
    def hub(name, locale, revision):
        assert (name,locale,revision)==('AmazonScience/massive','tl-PH','refs/convert/parquet')
        return DatasetDict(train=part(0,'train'), validation=part(1,'dev'), test=part(2,'test'))
    monkeypatch.setattr(datasets, 'load_dataset', hub)
    ds = load_intents('massive','tl-PH','dev')
    assert label_names(ds)==['a_a','b_b'] and ds.to_list()==[dict(text='none 1', label=0, id=1)]

@pytest.mark.skipif(not os.environ.get('MERGINGURIEL_MASSIVE'), reason='MERGINGURIEL_MASSIVE names no copy of MASSIVE')
def test_massive_itself():
    sizes = {s:len(load_intents('massive','sw-KE',s)) for s in ('train','dev','test')}
    assert sizes==dict(train=11514, dev=2033, test=2974)
    a,b = load_intents('massive','sw-KE','test'),load_intents('massive','km-KH','test')
    assert a['id'][:]==b['id'][:] and a['label'][:]==b['label'][:] and len(label_names(a))==60 and len(set(a['label']))==59

# samples

def test_subsample_keeps_proportions():
    ds = load_intents('home','cy-GB','train')
    for n in (1,5,9,10,100,593):
        some = subsample(ds,n)
        ids = set(some['id'])
        assert len(some)==len(ids)==n and some.features==ds.features and some['id'][:]==[i for i in ds['id'] if i in ids]
        if n>=9: assert np.bincount(some['label']).min()>=n//9
    assert subsample(ds,50,seed=1)['id'][:]!=subsample(ds,50)['id'][:]==subsample(ds,50)['id'][:]
    with pytest.raises(ValueError, match='n=0'): subsample(ds,0)

def test_unlabelled():
    ds = unlabelled(load_intents('toy','sw-KE','dev'))
    assert ds.column_names==['text','id'] and 'label' not in ds.features and unlabelled(ds).column_names==['text','id']

# halves

@pytest.mark.parametrize('name', ['toy','home'])
def test_the_halves_are_the_whole_and_share_no_origin(name, home_cache):
    locale = {'toy':'sq-AL','home':'cy-GB'}[name]
    whole,a,b = (load_intents(name, locale, 'train', part=o) for o in (None,'A','B'))
    assert sorted(a['id'][:]+b['id'][:])==sorted(whole['id'][:]) and len(a) and len(b)
    assert not {origin_of(o,name) for o in a['id'][:]}&{origin_of(o,name) for o in b['id'][:]}
    assert len({whole._fingerprint, a._fingerprint, b._fingerprint})==3
    assert label_names(a)==label_names(b)==label_names(whole)

def test_a_half_depends_on_the_id_alone():
    assert [half_of(o,'massive') for o in range(12)]==[half_of(str(o),'toy') for o in range(12)]
    assert half_of('abc-0','home')==half_of('abc-7','home')
    assert 900<sum(half_of(o,'massive')=='A' for o in range(2000))<1100

@pytest.mark.skipif(not os.environ.get('MERGINGURIEL_MASSIVE'), reason='needs a copy of MASSIVE')
def test_the_halves_of_massive():
    ids = {o:[load_intents('massive',o,'train',part=p)['id'][:] for p in 'AB'] for o in ('sw-KE','th-TH')}
    assert ids['sw-KE']==ids['th-TH'] and [len(o) for o in ids['sw-KE']]==[5763,5751]
    assert len(set(load_intents('massive','sw-KE','train',part='A')['label'][:]))==60

def test_bad_parts(tmp_path):
    with pytest.raises(ValueError, match="part is 'A' or 'B'"): load_intents('toy','en-US','train',part='C')
    with pytest.raises(ValueError, match="only 'train' has parts, and 'dev' is whole"): load_intents('toy','en-US','dev',part='A')
    (tmp_path/'one.csv').write_text('id,text,label,split\n0,a,x,train\n1,b,y,test\n')
    empty = 'B' if half_of(0,'')=='A' else 'A'
    with pytest.raises(MissingDataError, match='has too few|too few'): load_intents(tmp_path/'one.csv','en-US','train',part=empty)

def test_shared_ids():
    a,b = (load_intents('toy','en-US','train',part=o) for o in 'AB')
    target = load_intents('toy','sq-AL','train')
    assert shared_ids(target,a)==len(a) and shared_ids(target,a,b)==len(target) and shared_ids(b,a)==0
    assert shared_ids(target, [str(o) for o in a['id'][:3]])==3
    assert shared_ids(unlabelled(load_intents('toy','sq-AL','dev')), a)==0
