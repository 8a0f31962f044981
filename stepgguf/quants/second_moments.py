"""draft"""
from __future__ import annotations
from dataclasses import dataclass
import numpy as np
from stepgguf.quants.kernels import choose_kernel, decoder_for
from stepgguf.quants.lanes.descent import descend
from stepgguf.quants.lanes.feedback import feed_back
from stepgguf.quants.lanes.part_tiles import Rules
from stepgguf.quants.parts import TABLE, pack, take_apart
from stepgguf.quants.parts.blocks import empty_parts
from stepgguf.quants.types import row_size
STEP=256

def rules_of(l):
    s=l.scales; m=l.minimums
    return Rules(l.block,l.sub,l.codes.lowest,l.codes.highest,l.codes.zero,l.uneven,s is not None, 0 if s is None else s.lowest-s.zero, 0 if s is None else s.highest-s.zero, 0 if l.minimum_factor is None else 1 if m is None else 2, 0 if m is None else m.highest)

@dataclass
class SM:
    h: np.ndarray; lam: float; m: np.ndarray; r2: np.ndarray
def prepare(H,damping):
    mean=np.trace(H)/len(H)
    h=np.ascontiguousarray(H/mean,np.float32)
    a=h[::-1,::-1].copy(); a[np.diag_indices(len(a))]+=damping
    L=np.linalg.cholesky(a); R=np.ascontiguousarray(L[::-1,::-1]); d=np.diagonal(R).copy(); R/=d
    return SM(h,damping,R,d**2)

def stock(t,W,imp):
    out=np.empty((len(W),row_size(t,W.shape[1])),np.uint8); choose_kernel(t,weighted=imp is not None).encode(np.ascontiguousarray(W),out,None if imp is None else np.ascontiguousarray(imp)); return out
def steps(l,p):
    k=l.block//l.sub
    return np.repeat(p.factors,k,1)*p.scales, np.repeat(p.minimum_factors,k,1)*p.minimums

def encode(t,W,sm,imp,sweeps=3,passes=2,refit=2,fb=True,cond=False,log=None,tm=None):
    l=TABLE[t]; rules=rules_of(l); n,c=W.shape; E=np.empty_like(W)
    import time
    T=tm if tm is not None else {}
    def tick(k,t0): T[k]=T.get(k,0)+time.perf_counter()-t0
    if fb:
        parts=empty_parts(l,n,c)
        for o in range(0,c,STEP):
            w=min(STEP,c-o); t0=time.perf_counter()
            G=W[:,o:o+w].copy()
            if o: G+=E[:,:o]@sm.m[:o,o:o+w]
            tick('fb gemm',t0); t0=time.perf_counter()
            data=stock(t,G,(sm.r2 if cond else imp)[o:o+w]); tick('stock',t0); t0=time.perf_counter(); p=take_apart(t,data); a,b=steps(l,p)
            for x,y in zip(parts.part_of(l,o,w),p): x[:]=y
            tick('parts',t0); t0=time.perf_counter()
            feed_back(G,W,o,np.ascontiguousarray(sm.m[o:o+w,o:o+w]),a,b,rules,parts.codes,E); tick('fb kernel',t0)
    else:
        data=stock(t,W,imp); parts=take_apart(t,data); parts=type(parts)(*(np.ascontiguousarray(x) for x in parts)); D=np.empty_like(W); decoder_for(t).decode(data,D); E=W-D
    if log: log('fb',E)
    for s in range(sweeps):
        gains=np.zeros(n,np.float32)
        for o in range(0,c,STEP):
            w=min(STEP,c-o); t0=time.perf_counter()
            G=E@sm.h[:,o:o+w]; G+=sm.lam*E[:,o:o+w]; tick('gemm',t0); t0=time.perf_counter()
            hb=sm.h[o:o+w,o:o+w].copy(); hb[np.diag_indices(w)]+=sm.lam
            descend(W,G,hb,*parts,rules,o,passes,refit,E,gains); tick('descend',t0)
        if log: log(f'sweep {s} gain {gains.sum(dtype=float):.4g}',E)
    t0=time.perf_counter(); r=pack(t,parts); tick('parts',t0)
    return r
