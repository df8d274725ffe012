"Checkpoints: damaged input, interrupted output, agreement with the safetensors library."
import errno,json,os,signal,struct,subprocess,sys,time
import pytest
import torch
from safetensors.torch import load_file,save_file
from merginguriel.checkpoint import *
from merginguriel.tensor_files import *
from merginguriel.core import *

def raw(header, data=b'', n=None):
    b = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack('<Q', len(b) if n is None else n)+b+data

def f32(a, b, shape, **kw): return {'dtype':'F32', 'shape':shape, 'data_offsets':[a,b], **kw}

broken = {
    'empty': (b'', 'truncated'),
    'seven bytes': (b'1234567', 'truncated'),
    'header longer than the file': (raw(b'{}', n=10_000), 'announces a header of 10,000'),
    'absurd header': (raw(b'{}', n=2**63), 'announces a header'),
    'header of no bytes': (raw(b'', b'xxxx'), 'announces a header of 0'),
    'zeros': (bytes(4096), 'announces a header of 0'),
    'not JSON': (raw(b'{"a": nope}'), 'not valid JSON'),
    'not UTF-8': (raw(b'{"\xff": 1}'), 'not valid JSON'),
    'deep JSON': (raw(b'{"a":'+b'['*100_000), 'not valid JSON'),
    'a list': (raw([1,2]), 'is a list'),
    'HTML': (b'<!DOCTYPE html><html><body>Not found</body></html>', 'truncated or not safetensors'),
    'LFS pointer': (b'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n', 'git lfs pull'),
    'a name twice': (raw(b'{"a":{},"a":{}}', b'x'), "'a' occurs twice"),
    'truncated': (raw({'a':f32(0,8,[2])}, bytes(5)), 'ends 3 bytes before'),
    'trailing bytes': (raw({'a':f32(0,8,[2])}, bytes(9)), '1 bytes after'),
    'overlap': (raw({'a':f32(0,8,[2]), 'b':f32(4,12,[2])}, bytes(12)), "'b'.*overlaps"),
    'hole': (raw({'a':f32(0,4,[1]), 'b':f32(8,12,[1])}, bytes(12)), "4 bytes before 'b'"),
    'hole at the start': (raw({'a':f32(4,8,[1])}, bytes(8)), "4 bytes before 'a'"),
    'out of range': (raw({'a':f32(0,4,[1]), 'b':f32(4,400,[99])}, bytes(8)), 'ends 392 bytes'),
    'backwards': (raw({'a':f32(8,0,[2])}, bytes(8)), 'byte range'),
    'negative': (raw({'a':f32(-8,0,[2])}, bytes(8)), 'byte range'),
    'offsets of text': (raw({'a':f32('0','8',[2])}, bytes(8)), 'byte range'),
    'length against shape': (raw({'a':f32(0,8,[3])}, bytes(8)), r'F32 \[3\], 12 bytes, but its range holds 8'),
    'length against type': (raw({'a':{'dtype':'F64','shape':[2],'data_offsets':[0,8]}}, bytes(8)), '16 bytes'),
    'negative shape': (raw({'a':f32(0,8,[-2])}, bytes(8)), 'not a list of counts'),
    'huge shape': (raw({'a':f32(0,8,[2**62,2**62])}, bytes(8)), 'its range holds 8'),
    'boolean shape': (raw({'a':f32(0,4,[True])}, bytes(4)), 'not a list of counts'),
    'no shape': (raw({'a':{'dtype':'F32','data_offsets':[0,4]}}, bytes(4)), 'lacks dtype'),
    'unknown type': (raw({'a':{'dtype':'F4','shape':[1],'data_offsets':[0,1]}}, bytes(1)), "type 'F4'"),
    'metadata of numbers': (raw({'__metadata__':{'a':1}}), 'strings to strings'),
}

@pytest.mark.parametrize('name', broken)
def test_broken_file(tmp_path, name):
    data,says = broken[name]
    p = tmp_path/'model.safetensors'
    p.write_bytes(data)
    with pytest.raises(CheckpointError, match=says) as e: open_checkpoint(p)
    assert 'model.safetensors' in str(e.value)
    with pytest.raises(CheckpointError): open_checkpoint(tmp_path)

@pytest.mark.parametrize('cut', [0,1,7,8,20,100,-1])
def test_truncated_anywhere(tmp_path, cut):
    save_file({'a':torch.ones(50), 'b':torch.zeros(3,3)}, tmp_path/'m.safetensors')
    b = (tmp_path/'m.safetensors').read_bytes()
    (tmp_path/'m.safetensors').write_bytes(b[:cut])
    with pytest.raises(CheckpointError, match='truncated'): open_checkpoint(tmp_path/'m.safetensors')

# --- folders, shards

def shards(folder, weight_map=None, **files):
    for n,d in files.items(): save_file(d, folder/f'{n}.safetensors')
    if weight_map is None: weight_map = {k:f'{n}.safetensors' for n,d in files.items() for k in d}
    (folder/'model.safetensors.index.json').write_text(json.dumps({'metadata':{}, 'weight_map':weight_map}))
    return folder

one,two = {'x':torch.arange(6.).reshape(2,3)},{'y':torch.ones(2).bfloat16(), 'z':torch.tensor(3)}

def test_shards_are_one_model(tmp_path):
    s = shards(tmp_path, a=one, b=two)
    save_file({**one,**two}, tmp_path/'single.safetensors')
    a,b = open_checkpoint(s),open_checkpoint(tmp_path/'single.safetensors')
    assert a.keys()==b.keys()==['x','y','z'] and a.digest()==b.digest() and a.nbytes==b.nbytes
    assert open_checkpoint(s/'model.safetensors.index.json').digest()==a.digest()
    assert torch.equal(a.read('x', (1,2)), one['x'][1:])

@pytest.mark.parametrize('weight_map,says', [
    ({'x':'a.safetensors','y':'c.safetensors'}, 'c.safetensors, which is not there'),
    ({'x':'a.safetensors','y':'b.safetensors','z':'b.safetensors','w':'b.safetensors'}, "e.g. 'w'"),
    ({'x':'a.safetensors','y':'b.safetensors'}, "e.g. 'z'"),
    ({'x':'b.safetensors','y':'b.safetensors','z':'a.safetensors'}, 'disagree'),
    ({'x':'../a.safetensors'}, 'own folder'), ({'x':7}, 'own folder'), ({}, 'own folder'), ([], 'own folder')])
def test_index_that_disagrees(tmp_path, weight_map, says):
    s = shards(tmp_path, weight_map, a=one, b=two)
    with pytest.raises(CheckpointError, match=says): open_checkpoint(s)

def test_name_in_two_shards(tmp_path):
    s = shards(tmp_path, {'x':'b.safetensors','w':'a.safetensors','y':'b.safetensors','z':'b.safetensors'},
        a={**one,'w':torch.ones(1)}, b={**one,**two})
    with pytest.raises(CheckpointError, match="'x' is in both a.safetensors and b.safetensors"): open_checkpoint(s)

def test_index_not_json(tmp_path):
    (tmp_path/'model.safetensors.index.json').write_text('{"weight_map":')
    with pytest.raises(CheckpointError, match='not valid JSON'): open_checkpoint(tmp_path)

def test_folder_without_weights(tmp_path):
    with pytest.raises(MissingDataError, match='holds nothing'): open_checkpoint(tmp_path)
    (tmp_path/'config.json').write_text('{}')
    with pytest.raises(MissingDataError, match='config.json'): open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match='weight_map'): open_checkpoint(tmp_path/'config.json')

# --- pickles

def test_pickles_only_when_asked(tmp_path):
    torch.save({**one,**two}, tmp_path/'pytorch_model.bin')
    for p in (tmp_path, tmp_path/'pytorch_model.bin'):
        with pytest.raises(CheckpointError, match='allow_pickle=True'): open_checkpoint(p)
        c = open_checkpoint(p, allow_pickle=True)
        assert c.digest()==open_checkpoint({**one,**two}).digest()
        c.read('x').zero_()
        assert torch.equal(c.read('x'), one['x'])

def test_old_pickle_and_nested(tmp_path):
    torch.save({'state_dict':one}, tmp_path/'m.pt', _use_new_zipfile_serialization=False)
    assert open_checkpoint(tmp_path/'m.pt', allow_pickle=True).keys()==['x']

def test_malicious_pickle(tmp_path):
    import pickle
    class Evil:
        def __reduce__(self): return os.mkdir, (str(tmp_path/'owned'),)
    (tmp_path/'m.bin').write_bytes(pickle.dumps({'x':Evil()}))
    with pytest.raises(CheckpointError, match='weights_only'): open_checkpoint(tmp_path/'m.bin', allow_pickle=True)
    torch.save({'x':Evil()}, tmp_path/'n.bin')
    with pytest.raises(CheckpointError, match='weights_only'): open_checkpoint(tmp_path/'n.bin', allow_pickle=True)
    assert not (tmp_path/'owned').exists()

def test_pickle_of_other_things(tmp_path):
    for o,says in [([1], 'a list'), ({'a':3}, "'a'.* is a int"), ({3:torch.ones(1)}, '3 in')]:
        torch.save(o, tmp_path/'m.pt')
        with pytest.raises(CheckpointError, match=says): open_checkpoint(tmp_path/'m.pt', allow_pickle=True)

# --- agreement with the library, in every type

def sample(dtype):
    g = torch.Generator().manual_seed(0)
    b = torch.randint(0, 2 if dtype==torch.bool else 256, (3,4,dtype.itemsize), generator=g, dtype=torch.uint8)
    return b.view(dtype).reshape(3,4)

def same_bits(a, b):
    bits = lambda t: t.contiguous().reshape(-1).view(torch.uint8)
    return a.dtype==b.dtype and a.shape==b.shape and torch.equal(bits(a), bits(b))

@pytest.mark.parametrize('code', list(stored_dtypes))
def test_every_type_both_ways(tmp_path, code):
    dt = stored_dtypes[code]
    d = {'m':sample(dt), 's':sample(dt)[0,0].clone(), 'none':torch.empty(0,5,dtype=dt),
        'odd':torch.ones(3,dtype=torch.uint8)}
    ours = save_checkpoint(d, tmp_path/'ours.safetensors')
    try: theirs = load_file(ours)
    except (KeyError,AttributeError): pytest.skip(f'this safetensors does not read {code}')
    assert theirs.keys()==d.keys() and all(same_bits(theirs[k], d[k]) for k in d)
    save_file(d, tmp_path/'theirs.safetensors')
    c = open_checkpoint(tmp_path/'theirs.safetensors')
    assert all(same_bits(c.read(k), d[k]) for k in d) and same_bits(c.read('m', (1,3)), d['m'][1:])
    assert c.digest()==open_checkpoint(ours).digest()==open_checkpoint(d).digest()

def test_mapped_and_direct_reads_agree(tmp_path):
    w = torch.randn(1000,700)
    save_file({'a':torch.ones(3,dtype=torch.uint8), 'w':w}, tmp_path/'m.safetensors')
    c = open_checkpoint(tmp_path/'m.safetensors')
    for a,b in [(0,1000),(0,1),(999,1000),(3,900),(5,5)]: assert torch.equal(c.read('w', (a,b)), w[a:b])
    before = (tmp_path/'m.safetensors').read_bytes()
    t = c.read('w').neg_()
    assert torch.equal(c.read('w'), w) and (tmp_path/'m.safetensors').read_bytes()==before
    del c
    assert torch.equal(t, -w)

def test_unaligned_values(tmp_path):
    h = json.dumps({'w':{'dtype':'F32','shape':[300_000],'data_offsets':[0,1_200_000]}}).encode()
    h += b' '*((1-len(h))%8) # the data starts at 8+1 modulo 8
    w = torch.randn(300_000)
    (tmp_path/'m.safetensors').write_bytes(struct.pack('<Q', len(h))+h+w.numpy().tobytes())
    assert torch.equal(open_checkpoint(tmp_path/'m.safetensors').read('w'), w)

def test_reading_does_not_load_the_file(tmp_path):
    save_checkpoint({'w':torch.zeros(16_000_000)}, tmp_path/'m.safetensors')
    code = """if 1:
        import sys; from merginguriel.checkpoint import *
        rss = lambda: int(open('/proc/self/statm').read().split()[1])*4096
        a = rss(); c = open_checkpoint(sys.argv[1]); c.read('w', (5,9)); c.read('w')[::4_000_000].sum()
        print(rss()-a)"""
    if not os.path.exists('/proc/self/statm'): pytest.skip('no /proc')
    o = subprocess.run([sys.executable, '-c', code, tmp_path/'m.safetensors'], stdout=subprocess.PIPE, check=True)
    assert int(o.stdout)<20_000_000

def test_rows(tmp_path):
    c = open_checkpoint(one)
    for r in [(0,3),(-1,2),(2,1)]:
        with pytest.raises(IndexError, match='has 2'): c.read('x', r)
    with pytest.raises(IndexError, match='step'): c.read('x', slice(0,2,2))
    with pytest.raises(IndexError, match='single number'): open_checkpoint(two).read('z', (0,1))
    with pytest.raises(KeyError, match="'x'"): c.read('nothing like it')

def test_digest_sees_a_change_in_place(tmp_path):
    p = save_checkpoint(one, tmp_path/'m.safetensors')
    a = open_checkpoint(p).digest()
    time.sleep(.15)
    assert open_checkpoint(p).digest()==a==open_checkpoint(p).digest()
    with open(p, 'r+b') as f: f.seek(-1, 2); f.write(b'\x41')
    assert open_checkpoint(p).digest()!=a

def test_shortened_while_open(tmp_path):
    c = open_checkpoint(save_checkpoint({'w':torch.ones(600,600)}, tmp_path/'m.safetensors'))
    os.truncate(tmp_path/'m.safetensors', 5000)
    with pytest.raises(CheckpointError, match='became shorter'): c.read('w')

def test_replaced_while_open(tmp_path):
    p = save_checkpoint(one, tmp_path/'m.safetensors')
    c = open_checkpoint(p)
    save_checkpoint({'x':torch.zeros(9)}, p)
    assert torch.equal(c.read('x'), one['x']) and open_checkpoint(p).shape('x')==(9,)

def test_transformers_reads_what_we_write(tmp_path):
    from transformers import AutoModel,BertConfig,BertModel
    m = BertModel(BertConfig(vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=8))
    m.config.save_pretrained(tmp_path)
    save_checkpoint(m.state_dict(), tmp_path)
    n,info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info['missing_keys'] and not info['unexpected_keys']
    assert all(same_bits(a, b) for a,b in zip(m.state_dict().values(), n.state_dict().values()))

# --- writing

spec = {'a':(torch.float32,(4,2)), 'b':(torch.int64,())}

def test_writer_refuses(tmp_path):
    p = tmp_path/'m.safetensors'
    with pytest.raises(ValueError, match='ends in .safetensors'): CheckpointWriter(tmp_path/'model.bin', spec)
    with pytest.raises(CheckpointError, match='cannot store'): CheckpointWriter(p, {'a':(torch.complex128,(1,))})
    with pytest.raises(ValueError, match='not open'): CheckpointWriter(p, spec).write('a', torch.ones(4,2))
    for args,says in [(('a', torch.ones(2,4)), 'announced'), (('a', torch.ones(4,2).double()), 'announced'),
            (('a', torch.ones(3,2), (0,2)), 'announced'), (('b', torch.tensor(1.)), 'announced')]:
        with pytest.raises(ValueError, match=says):
            with CheckpointWriter(p, spec) as w: w.write(*args)
    with pytest.raises(KeyError, match='not announced'):
        with CheckpointWriter(p, spec) as w: w.write('c', torch.ones(1))
    with pytest.raises(ValueError, match='written before'):
        with CheckpointWriter(p, spec) as w:
            w.write('a', torch.ones(2,2), (0,2)); w.write('a', torch.ones(2,2), (1,3))
    with pytest.raises(CheckpointError, match=r"2 of 2 tensors are incomplete"):
        with CheckpointWriter(p, spec) as w: w.write('a', torch.ones(3,2), (0,3))
    assert list(tmp_path.iterdir())==[]

def test_writer_takes_views(tmp_path):
    a = torch.arange(8.).reshape(2,4).t().requires_grad_()
    p = save_checkpoint({'a':a, 'b':torch.tensor(3).expand(2)}, tmp_path)
    assert p==tmp_path/'model.safetensors' and torch.equal(load_file(p)['a'], a) and load_file(p)['b'].tolist()==[3,3]

writer = """if 1:
    import sys,time,torch; from merginguriel.checkpoint import *
    with CheckpointWriter(sys.argv[1], {'a':(torch.float32,(1000,1000)), 'b':(torch.float32,(9,))}) as w:
        w.write('a', torch.ones(1000,1000)); print('half', flush=True); time.sleep(60)"""

@pytest.mark.parametrize('before', [True,False])
def test_killed_writer(tmp_path, before):
    p = tmp_path/'model.safetensors'
    if before: save_checkpoint(one, p)
    o = subprocess.Popen([sys.executable, '-c', writer, str(p)], stdout=subprocess.PIPE, text=True)
    assert o.stdout.readline()=='half\n'
    o.send_signal(signal.SIGKILL); o.wait(); o.stdout.close()
    left = [q for q in tmp_path.iterdir() if q!=p]
    assert len(left)==1 and left[0].name.endswith('.tmp')
    if before: assert open_checkpoint(tmp_path).digest()==open_checkpoint(one).digest()
    else:
        with pytest.raises(MissingDataError): open_checkpoint(tmp_path)
    os.rename(left[0], p)
    with pytest.raises(CheckpointError, match='announces a header of 0'): open_checkpoint(p)

limited = """if 1:
    import resource,sys,torch; from merginguriel.checkpoint import *
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000,100_000))
    save_checkpoint({'a':torch.ones(100_000)}, sys.argv[1])"""

def test_file_size_limit(tmp_path):
    p = save_checkpoint(one, tmp_path/'m.safetensors')
    o = subprocess.run([sys.executable, '-c', limited, str(p)], capture_output=True, text=True)
    assert o.returncode and 'no room for m.safetensors: it takes 400,' in o.stderr
    assert list(tmp_path.iterdir())==[p] and open_checkpoint(p).digest()==open_checkpoint(one).digest()

@pytest.mark.parametrize('call', ['posix_fallocate','pwrite'])
def test_full_disk(tmp_path, monkeypatch, call):
    p = save_checkpoint(one, tmp_path/'m.safetensors')
    real,n = os.pwrite,[0]
    def full(*args):
        n[0] += 1
        if call=='pwrite' and n[0]<3: return real(*args)
        raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match='no room for m.safetensors.*free some space.*Nothing was changed') as e:
        save_checkpoint({'a':torch.ones(5), 'b':torch.ones(5)}, p)
    monkeypatch.undo()
    assert e.value.errno==errno.ENOSPC and list(tmp_path.iterdir())==[p]
    assert open_checkpoint(p).digest()==open_checkpoint(one).digest()

def test_file_system_that_cannot_reserve(tmp_path, monkeypatch):
    def no(*args): raise OSError(errno.EOPNOTSUPP, 'not supported')
    monkeypatch.setattr(os, 'posix_fallocate', no)
    assert torch.equal(load_file(save_checkpoint(one, tmp_path))['x'], one['x'])

def test_copy_model_files(tmp_path):
    with pytest.raises(MissingDataError, match='no config.json'): copy_model_files(tmp_path, tmp_path/'out')
    for n in ('config.json','vocab.txt','model.safetensors','README.md'): (tmp_path/n).write_text('{}')
    assert copy_model_files(tmp_path, tmp_path/'out')==['config.json','vocab.txt']
    assert copy_model_files(tmp_path/'model.safetensors', tmp_path/'out2', tokenizer=False)==['config.json']
