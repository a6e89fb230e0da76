// Asks a vCenter for properties of all machines through govmomi, page by page, and throws the answers away.
package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"flag"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"strings"

	"github.com/vmware/govmomi"
	"github.com/vmware/govmomi/session"
	"github.com/vmware/govmomi/view"
	"github.com/vmware/govmomi/vim25"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"
)

func main() {
	dir := flag.String("dir", "", "the simulator's folder")
	paths := flag.String("paths", "", "properties")
	flag.Parse()
	if err := list(*dir, strings.Split(*paths, ",")); err != nil {
		fmt.Fprintln(os.Stderr, "listing:", err)
		os.Exit(1)
	}
}

func list(dir string, paths []string) error {
	text := func(name string) string {
		b, _ := os.ReadFile(filepath.Join(dir, name))
		return strings.TrimSpace(string(b))
	}
	address, err := url.Parse(text("url"))
	if err != nil {
		return err
	}
	ctx := context.Background()
	authorities := x509.NewCertPool()
	authorities.AppendCertsFromPEM([]byte(text("ca.pem")))
	connection := soap.NewClient(address, false)
	connection.DefaultTransport().TLSClientConfig = &tls.Config{RootCAs: authorities}
	client, err := vim25.NewClient(ctx, connection)
	if err != nil {
		return err
	}
	manager := session.NewManager(client)
	if err := manager.Login(ctx, url.UserPassword(text("user"), text("password"))); err != nil {
		return err
	}
	whole := govmomi.Client{Client: client, SessionManager: manager}
	defer func() { _ = whole.Logout(ctx) }()
	machines, err := view.NewManager(client).CreateContainerView(ctx, client.ServiceContent.RootFolder, []string{"VirtualMachine"}, true)
	if err != nil {
		return err
	}
	skip := true
	request := types.RetrievePropertiesEx{
		This: client.ServiceContent.PropertyCollector,
		SpecSet: []types.PropertyFilterSpec{{
			ObjectSet: []types.ObjectSpec{{
				Obj: machines.Reference(), Skip: &skip,
				SelectSet: []types.BaseSelectionSpec{&types.TraversalSpec{Type: "ContainerView", Path: "view"}},
			}},
			PropSet: []types.PropertySpec{{Type: "VirtualMachine", PathSet: paths}},
		}},
		Options: types.RetrieveOptions{MaxObjects: 100},
	}
	answer, err := methods.RetrievePropertiesEx(ctx, client, &request)
	if err != nil {
		return err
	}
	count := 0
	for result := answer.Returnval; result != nil; {
		count += len(result.Objects)
		if result.Token == "" {
			break
		}
		next, err := methods.ContinueRetrievePropertiesEx(ctx, client, &types.ContinueRetrievePropertiesEx{This: request.This, Token: result.Token})
		if err != nil {
			return err
		}
		result = &next.Returnval
	}
	fmt.Println(count)
	return nil
}
