package main

import (
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"
)

// collector pages its answers, which the simulator's own does not.
type collector struct{ simulator.PropertyCollector }

var pages = struct {
	size  int
	last  int64
	mutex sync.Mutex
	rest  map[string][]types.ObjectContent
}{size: 500, rest: map[string][]types.ObjectContent{}}

func registerCollector() {
	content := simulator.Map.Get(vim25.ServiceInstance).(*simulator.ServiceInstance).Content
	paged := &collector{}
	paged.Self = content.PropertyCollector
	simulator.Map.Put(paged)
}

func page(objects []types.ObjectContent, limit int) types.RetrieveResult {
	if limit <= 0 || limit > pages.size {
		limit = pages.size
	}
	if len(objects) <= limit {
		return types.RetrieveResult{Objects: objects}
	}
	token := fmt.Sprintf("%d:%d", atomic.AddInt64(&pages.last, 1), limit)
	pages.mutex.Lock()
	pages.rest[token] = objects[limit:]
	pages.mutex.Unlock()
	return types.RetrieveResult{Objects: objects[:limit:limit], Token: token}
}

func (c *collector) RetrievePropertiesEx(ctx *simulator.Context, r *types.RetrievePropertiesEx) soap.HasFault {
	answer := c.PropertyCollector.RetrievePropertiesEx(ctx, r)
	body := answer.(*methods.RetrievePropertiesExBody)
	if body.Res != nil && body.Res.Returnval != nil {
		if len(body.Res.Returnval.Objects) == 0 {
			// A real server leaves the result out then.
			body.Res.Returnval = nil
		} else {
			result := page(body.Res.Returnval.Objects, int(r.Options.MaxObjects))
			body.Res.Returnval = &result
		}
	}
	return body
}

func (c *collector) ContinueRetrievePropertiesEx(r *types.ContinueRetrievePropertiesEx) soap.HasFault {
	pages.mutex.Lock()
	rest, known := pages.rest[r.Token]
	delete(pages.rest, r.Token)
	pages.mutex.Unlock()
	if !known {
		return &methods.ContinueRetrievePropertiesExBody{
			Fault_: simulator.Fault("", &types.InvalidArgument{InvalidProperty: "token"}),
		}
	}
	var limit int
	_, _ = fmt.Sscanf(r.Token, "%d:%d", new(int), &limit)
	return &methods.ContinueRetrievePropertiesExBody{
		Res: &types.ContinueRetrievePropertiesExResponse{Returnval: page(rest, limit)},
	}
}

func (c *collector) CancelRetrievePropertiesEx(r *types.CancelRetrievePropertiesEx) soap.HasFault {
	pages.mutex.Lock()
	delete(pages.rest, r.Token)
	pages.mutex.Unlock()
	return &methods.CancelRetrievePropertiesExBody{Res: &types.CancelRetrievePropertiesExResponse{}}
}
