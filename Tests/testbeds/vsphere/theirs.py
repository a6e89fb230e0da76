"""What pyvmomi reads from a vCenter, in flotilla's words."""
import base64
import ipaddress
import json
import ssl
import urllib.request

from pyVim.connect import Disconnect, SmartConnect
from pyVmomi import VmomiSupport, vim

OPTIONAL = VmomiSupport.F_OPTIONAL
# Two backings came to the API after Debian's pyvmomi.
PARENT, VERSION = "vim.vm.device.VirtualDevice", "vim.version.version9"
LATER = {
    "AllowedDevice": ("vmodl.DynamicData", [
        ("vendorId", "int", 0), ("deviceId", "int", 0), ("subVendorId", "int", OPTIONAL), ("subDeviceId", "int", OPTIONAL),
        ("revisionId", "short", OPTIONAL)]),
    "DynamicBackingInfo": (f"{PARENT}.DeviceBackingInfo", [
        ("allowedDevice", "vim.vm.device.VirtualPCIPassthrough.AllowedDevice[]", OPTIONAL), ("customLabel", "string", OPTIONAL),
        ("assignedId", "string", OPTIONAL)]),
    "DvxBackingInfo": (f"{PARENT}.BackingInfo", [
        ("deviceClass", "string", OPTIONAL), ("configParams", "vim.option.OptionValue[]", OPTIONAL)]),
}
for name, (base, fields) in LATER.items():
    if not hasattr(vim.vm.device.VirtualPCIPassthrough, name):
        VmomiSupport.CreateDataType(
            f"vim.vm.device.VirtualPCIPassthrough.{name}", f"VirtualPCIPassthrough{name}", base, VERSION,
            [(field, kind, VERSION, flags) for field, kind, flags in fields])

CONTROLLERS = {
    "VirtualLsiLogicController": "LSI_LOGIC", "VirtualLsiLogicSASController": "LSI_LOGIC_SAS", "VirtualBusLogicController": "BUS_LOGIC",
    "ParaVirtualSCSIController": "PVSCSI", "VirtualAHCIController": "SATA", "VirtualNVMEController": "NVME", "VirtualIDEController": "IDE"}
CARDS = {"VirtualVmxnet3": "vmxnet3", "VirtualE1000": "e1000", "VirtualE1000e": "e1000e"}
MODES = {"direct": "passthrough", "sharedDirect": "vgpu", "shared": "shared"}
POWER = {"poweredOn": "POWERED_ON", "poweredOff": "POWERED_OFF", "suspended": "SUSPENDED"}
DISPLAY = {0x0300, 0x0302, 0x0380}


def kind(thing):
    return type(thing).__name__.rpartition(".")[2]


def clean(value):
    """Without what protobuf's JSON leaves out, and numbers as numbers."""
    if isinstance(value, dict):
        pairs = {key: clean(item) for key, item in value.items()}
        return {key: item for key, item in pairs.items() if item not in (None, "", 0, False, {}, [])}
    if isinstance(value, (list, tuple)):
        return [clean(item) for item in value]
    if isinstance(value, str) and value.isdigit() and len(value) < 20:
        return int(value)
    return str(value) if isinstance(value, str) else value


def unescaped(name):
    for code, letter in [("%2f", "/"), ("%5c", "\\"), ("%25", "%")]:
        name = name.replace(code, letter).replace(code.upper(), letter)
    return name


def above(entity, wanted):
    while entity and not isinstance(entity, wanted):
        entity = entity.parent
    return entity


def datacenter(entity):
    found = above(entity, vim.Datacenter)
    return unescaped(found.name) if found else ""


def folder(vm):
    names, entity, top = [], vm.parent, above(vm, vim.Datacenter).vmFolder
    while entity and entity._moId != top._moId:
        names.insert(0, unescaped(entity.name))
        entity = entity.parent
    return "/".join(names)


def host_facts(host):
    by_address = {device.id: device for device in host.hardware.pciDevice}
    gpus = []
    for graphics in host.config.graphicsInfo:
        device = by_address[graphics.pciId]
        gpus.append({
            "address": graphics.pciId, "name": graphics.deviceName, "vendor": graphics.vendorName, "vendorID": device.vendorId & 0xffff,
            "deviceID": device.deviceId & 0xffff, "classCode": device.classId & 0xffff, "memoryBytes": graphics.memorySizeInKB * 1024,
            "mode": MODES.get(graphics.graphicsType, "basic")})
    cluster = host.parent if isinstance(host.parent, vim.ClusterComputeResource) else None
    return {
        "id": host._moId, "name": host.name, "datacenter": datacenter(host), "cluster": cluster.name if cluster else "",
        "uuid": host.hardware.systemInfo.uuid, "product": host.summary.config.product.fullName, "powerState": host.runtime.powerState,
        "connectionState": host.runtime.connectionState, "cpuCores": host.summary.hardware.numCpuCores,
        "memoryBytes": host.hardware.memorySize, "gpus": sorted(gpus, key=lambda gpu: gpu["address"]),
        "profiles": list(host.config.sharedPassthruGpuTypes)}


def infrastructure(content, view):
    return {
        "about": {
            "product": content.about.fullName, "version": content.about.apiVersion, "type": content.about.apiType,
            "instanceUUID": content.about.instanceUuid},
        "datacenters": [{"id": item._moId, "name": unescaped(item.name)} for item in view(vim.Datacenter)],
        "clusters": [
            {"id": item._moId, "name": item.name, "datacenter": datacenter(item)} for item in view(vim.ClusterComputeResource)],
        "datastores": [{
            "id": item._moId, "name": item.name, "datacenter": datacenter(item), "kind": item.summary.type,
            "capacityBytes": item.summary.capacity, "freeBytes": item.summary.freeSpace, "isAccessible": item.summary.accessible,
        } for item in view(vim.Datastore)],
        "networks": [{
            "id": item._moId, "name": unescaped(item.name), "datacenter": datacenter(item), "key": getattr(item, "key", None),
        } for item in view(vim.Network)],
        "hosts": [host_facts(item) for item in view(vim.HostSystem)],
    }


def disk_facts(device, controllers, stores):
    backing, controller = device.backing, controllers[device.controllerKey]
    chain, link = [], backing
    while link:
        chain.append(link.fileName)
        link = getattr(link, "parent", None)
    raw = isinstance(backing, vim.vm.device.VirtualDisk.RawDiskMappingVer1BackingInfo)
    return {
        "capacityBytes": device.capacityInBytes, "controller": CONTROLLERS[kind(controller)], "busNumber": controller.busNumber,
        "unitNumber": device.unitNumber, "mode": backing.diskMode, "shared": getattr(backing, "sharing", "") == "sharingMultiWriter",
        "thin": getattr(backing, "thinProvisioned", False), "rawDeviceMapping": backing.compatibilityMode if raw else "",
        "datastore": stores[backing.datastore._moId], "uuid": backing.uuid, "path": backing.fileName,
        "backingChain": chain if len(chain) > 1 else []}


def gateway(vm, index, each):
    """Of the default route whose router is in the address's subnet, else of the one that names the card."""
    if each.origin == "linklayer":
        return ""
    own = ipaddress.ip_interface(f"{each.ipAddress}/{each.prefixLength}")
    routes = [
        route.gateway for stack in vm.guest.ipStack for route in stack.ipRouteConfig.ipRoute
        if route.prefixLength == 0 and ipaddress.ip_address(route.network).version == own.version]
    near = [route.ipAddress for route in routes if ipaddress.ip_address(route.ipAddress) in own.network]
    return (near + [route.ipAddress for route in routes if route.device == str(index)] + [""])[0]


def nic_facts(device, vm, groups):
    backing = device.backing
    distributed = isinstance(backing, vim.vm.device.VirtualEthernetCard.DistributedVirtualPortBackingInfo)
    key = backing.port.portgroupKey if distributed else ""
    addresses = []
    for index, net in enumerate(vm.guest.net):
        if net.macAddress.lower() == device.macAddress.lower() and net.ipConfig:
            addresses = [{
                "ip": each.ipAddress, "prefixLength": each.prefixLength, "origin": each.origin, "dns": list(net.dnsConfig.ipAddress),
                "gateway": gateway(vm, index, each)} for each in net.ipConfig.ipAddress]
    return {
        "model": CARDS[kind(device)], "mac": device.macAddress.lower(), "network": unescaped(groups[key] if distributed else backing.deviceName),
        "portgroupKey": key, "connected": device.connectable.startConnected, "macKind": device.addressType.lower(), "addresses": addresses}


def assigned_facts(device, functions):
    """Label, facts, and whether it is a GPU (None: the host doesn't say)."""
    backing, label = device.backing, f"pciPassthru{device.key - 13000}"
    passthrough = vim.vm.device.VirtualPCIPassthrough
    if isinstance(backing, passthrough.VmiopBackingInfo):
        return label, {"vgpu": {"profile": backing.vgpu}}, True
    if isinstance(backing, passthrough.DvxBackingInfo):
        parameters = {option.key: option.value for option in backing.configParams}
        return label, {"dvx": {"deviceClass": backing.deviceClass, "parameters": parameters}}, None
    if isinstance(backing, passthrough.DynamicBackingInfo):
        allowed = [{
            "vendor": each.vendorId & 0xffff, "device": each.deviceId & 0xffff, "subsystemVendor": (each.subVendorId or 0) & 0xffff,
            "subsystemDevice": (each.subDeviceId or 0) & 0xffff, "revision": (each.revisionId or 0) & 0xffff,
        } for each in backing.allowedDevice]
        facts = {"allowed": allowed, "customLabel": backing.customLabel, "assignedAddress": backing.assignedId}
        return label, {"dynamic": facts}, None
    ids = {"vendor": backing.vendorId & 0xffff, "device": int(backing.deviceId) & 0xffff}
    # Addresses go stale: what has other ids is another device, and one with these ids elsewhere is as good.
    alike = {address: each for address, each in sorted(functions.items())
             if (each.vendorId & 0xffff, each.deviceId & 0xffff) == (ids["vendor"], ids["device"])}
    function = alike.get(backing.id, next(iter(alike.values()), None))
    if function:
        ids.update(subsystemVendor=function.subVendorId & 0xffff, subsystemDevice=function.subDeviceId & 0xffff)
    facts = {
        "passthrough": {"id": ids, "address": backing.id, "rawAddress": backing.id, "systemId": backing.systemId},
        "name": backing.deviceName, "classCode": function.classId & 0xffff if function else 0}
    return label, facts, (function.classId & 0xffff) in DISPLAY if function else None


def ports(devices):
    facts = {"removables": [], "serialPorts": [], "usbDevices": [], "tpm": False, "videoMemoryBytes": 0}
    for device in devices:
        if kind(device) == "VirtualCdrom":
            facts["removables"].append(
                {"kind": "CDROM", "backing": device.backing.fileName, "connected": device.connectable.startConnected})
        elif kind(device) == "VirtualSerialPort":
            facts["serialPorts"].append({"backingKind": "pipe", "backing": device.backing.pipeName})
        elif kind(device) == "VirtualUSB":
            facts["usbDevices"].append(
                {"backing": device.backing.deviceName, "vendorId": device.vendor, "productId": device.product})
        elif isinstance(device, vim.vm.device.VirtualTPM):
            facts["tpm"] = True
        elif isinstance(device, vim.vm.device.VirtualVideoCard):
            facts["videoMemoryBytes"] = device.videoRamSizeInKB * 1024
    return facts


def snapshots(info):
    found = []

    def walk(trees):
        for tree in trees:
            current = info.currentSnapshot and info.currentSnapshot._moId == tree.snapshot._moId
            found.append({"name": tree.name, "moid": tree.snapshot._moId, "quiesced": tree.quiesced, "current": bool(current)})
            walk(tree.childSnapshotList)

    if info:
        walk(info.rootSnapshotList)
    return found


def attached_tags(host, user, password, context, under):
    """Tags of VMs, which pyvmomi doesn't know, machine by machine, from /rest or /api."""
    session = ""
    rest = under != "api"

    def ask(path, body=None, method=None, **headers):
        request = urllib.request.Request(
            f"https://{host}/{'rest/com/vmware/cis' if rest else 'api'}{path}", None if body is None else json.dumps(body).encode(),
            {"Content-Type": "application/json", "vmware-api-session-id": session, **headers}, method=method)
        with urllib.request.urlopen(request, context=context) as answer:
            found = json.load(answer)
            return (found or {}).get("value", []) if rest else found

    account = base64.b64encode(f"{user}:{password}".encode()).decode()
    session = ask("/session", method="POST", Authorization=f"Basic {account}")
    place, mark, sign = ("/tagging", "id:", "~") if rest else ("/cis/tagging", "", "")
    found = {}
    for tag in ask(f"{place}/tag"):
        facts = ask(f"{place}/tag/{mark}{tag}")
        category = ask(f"{place}/category/{mark}{facts['category_id']}")["name"]
        for thing in ask(f"{place}/tag-association/{mark}{tag}?{sign}action=list-attached-objects", {}):
            found.setdefault(thing["id"], []).append({"category": category, "name": facts["name"]})
    return {key: sorted(tags, key=lambda tag: (tag["category"], tag["name"])) for key, tags in found.items()}


def machine(vm, functions, stores, groups, tags):
    config, guest, host = vm.config, vm.guest, vm.runtime.host
    devices = sorted(config.hardware.device, key=lambda device: device.key)
    controllers = {device.key: device for device in devices if hasattr(device, "busNumber")}
    extra = {option.key: option.value for option in config.extraConfig}
    memory, cpu = config.memoryAllocation, config.cpuAllocation
    disks = [device for device in devices if kind(device) == "VirtualDisk"]
    disks.sort(key=lambda disk: (controllers[disk.controllerKey].busNumber, disk.unitNumber))
    return {
        "source": {
            "datacenter": datacenter(vm), "vmMoid": vm._moId, "hostMoid": host._moId, "hostName": host.name,
            "hostUuid": host.hardware.systemInfo.uuid},
        "vm": {
            "name": unescaped(vm.name), "instanceUuid": config.instanceUuid, "biosUuid": config.uuid, "guestId": config.guestId,
            "guestFullName": config.guestFullName, "hardwareVersion": config.version, "firmware": config.firmware.upper(),
            "secureBoot": config.bootOptions.efiSecureBootEnabled, "powerState": POWER[vm.runtime.powerState],
            "cpu": {
                "count": config.hardware.numCPU, "coresPerSocket": config.hardware.numCoresPerSocket, "reservationMhz": cpu.reservation,
                "shares": cpu.shares.shares, "hotAdd": config.cpuHotAddEnabled, "hotRemove": config.cpuHotRemoveEnabled},
            "memory": {
                "bytes": config.hardware.memoryMB << 20, "reservationBytes": memory.reservation << 20, "shares": memory.shares.shares,
                "reservationLockedToMax": config.memoryReservationLockedToMax, "hotAdd": config.memoryHotAddEnabled},
            "tools": {
                "status": guest.toolsStatus, "version": guest.toolsVersion, "hostName": guest.hostName, "family": guest.guestFamily,
                "guestFullName": guest.guestFullName},
            "snapshots": snapshots(vm.snapshot), "changeTracking": config.changeTrackingEnabled, "encrypted": config.keyId is not None,
            "hypervisorHidden": extra.get("hypervisor.cpuid.v0", "").upper() == "FALSE", "folder": folder(vm),
            "annotation": config.annotation, "tags": tags.get(vm._moId, []), **ports(devices)},
        "disks": [disk_facts(device, controllers, stores) for device in disks],
        "nics": [nic_facts(device, vm, groups) for device in devices if kind(device) in CARDS],
        "devices": [
            assigned_facts(device, functions[host._moId]) for device in devices if kind(device) == "VirtualPCIPassthrough"],
        "extra": {key: value for key, value in extra.items() if key.startswith("pciPassthru.") or key == "hypervisor.cpuid.v0"},
    }


def read(dir, under):
    def text(name):
        with open(f"{dir}/{name}") as file:
            return file.read().strip()

    port = int(text("url").split(":")[2].split("/")[0])
    connection = SmartConnect(
        host="localhost", port=port, user=text("user"), pwd=text("password"), sslContext=ssl.create_default_context(cafile=f"{dir}/ca.pem"))
    try:
        content = connection.RetrieveContent()

        def view(type):
            made = content.viewManager.CreateContainerView(content.rootFolder, [type], True)
            items = list(made.view)
            made.Destroy()
            return items

        functions = {host._moId: {device.id: device for device in host.hardware.pciDevice} for host in view(vim.HostSystem)}
        stores = {store._moId: store.name for store in view(vim.Datastore)}
        groups = {group.key: group.name for group in view(vim.dvs.DistributedVirtualPortgroup)}
        tags = {}
        if content.about.apiType == "VirtualCenter":
            tags = attached_tags(
                f"localhost:{port}", text("user"), text("password"), ssl.create_default_context(cafile=f"{dir}/ca.pem"), under)
        return infrastructure(content, view), [machine(vm, functions, stores, groups, tags) for vm in view(vim.VirtualMachine)]
    finally:
        Disconnect(connection)
