"""The optimum by integer programming: linear in size, with one cut-off per sample and layer.

Eq. (5) couples all pairs of tokens. Here binaries y mark the ranks above a layer's cut-off and a
token survives exactly when it was alive and stands above it (x = x' AND y), which is the same set
of choices in 4 n rows per sample and layer. Only y has to be integer: x and r follow.
"""

from __future__ import annotations

from collections.abc import Callable

import highspy
import numpy as np

from ._problem import Problem
h0=0
def build(p):
    D,S,n=p.n_decisions,p.n_samples,p.first
    y=np.arange(D*S*n).reshape(D,S,n); x=y+y.size; r=2*y.size+np.arange(D)
    ncol=2*y.size+D
    # previous decision's column of token ranked k at d
    before=np.empty_like(x[1:])
    flat=(p.carry[:-1,:,:-1])-np.arange(S)[:,None]*(n+1)
    np.put_along_axis(before,flat,x[:-1],-1)
    cost=np.zeros(ncol)
    price=p.prices[...,:-1]/S
    cost[x.ravel()]-=price.ravel(); 
    cost[before.ravel()]+=price[1:].ravel(); offset=price[0].sum()
    blocks=[]
    def rows(cols,vals,lo,hi): blocks.append((np.stack(np.broadcast_arrays(*cols),-1).reshape(-1,len(cols)),vals,lo,hi))
    inf=highspy.kHighsInf
    rows([y[...,:-1],y[...,1:]],[1,-1],0,inf)
    rows([y,x],[1,-1],0,inf)
    rows([before,x[1:]],[1,-1],0,inf)
    rows([x[1:],before,y[1:]],[1,-1,-1],-1,inf)
    rows([x[0],y[0]],[1,-1],0,inf)
    rows([*np.moveaxis(x,-1,0),r[:,None]],[1]*n+[-1],0,0)
    rows([*r[:,None]],[1]*D,p.total-n,p.total-n)
    idx=np.concatenate([b[0].ravel() for b in blocks]).astype(np.int32)
    val=np.concatenate([np.tile(np.array(b[1],float),len(b[0])) for b in blocks])
    w=np.concatenate([np.full(len(b[0]),b[0].shape[1]) for b in blocks])
    st=np.r_[0,w.cumsum()].astype(np.int32)
    lo=np.concatenate([np.full(len(b[0]),float(b[2])) for b in blocks]);hi=np.concatenate([np.full(len(b[0]),float(b[3])) for b in blocks])
    ub=np.ones(ncol); ub[r]=n
    integ=np.zeros(ncol,np.int32); integ[y.ravel()]=1
    return ncol,len(lo),idx,val,st,lo,hi,cost,ub,integ,offset,y,x,r
def solve(p,lp=False,tl=60,presolve='off',log=False,warm=None):
    ncol,nrow,idx,val,st,lo,hi,cost,ub,integ,offset,y,x,r=build(p)
    h=highspy.Highs()
    h.setOptionValue('output_flag',log); h.setOptionValue('presolve',presolve); h.setOptionValue('time_limit',float(tl))
    h.setOptionValue('mip_rel_gap',1e-6); h.setOptionValue('threads',1)
    if lp: integ=integ*0
    h.passModel(ncol,nrow,len(idx),int(highspy.MatrixFormat.kRowwise),int(highspy.ObjSense.kMinimize),float(offset),cost,np.zeros(ncol),ub,lo,hi,st,idx,val,integ)
    if warm is not None: h.setSolution(len(r),r.astype(np.int32),warm[1:].astype(float))
    h.run()
    info=h.getInfo(); sol=np.array(h.getSolution().col_value)
    return info.objective_function_value, info.mip_dual_bound, np.r_[p.first,sol[r]] if len(sol) else None
