/// Envelopes as the common writers lay them out.
enum OVFText {
    static let head = """
        <?xml version="1.0" encoding="UTF-8"?>
        <Envelope xmlns="http://schemas.dmtf.org/ovf/envelope/1" xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1" \
        xmlns:rasd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_ResourceAllocationSettingData" \
        xmlns:vmw="http://www.vmware.com/schema/ovf" \
        xmlns:vssd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_VirtualSystemSettingData">

        """

    static func item(_ id: Int, _ type: Int, _ fields: String) -> String {
        "<Item><rasd:ElementName>item \(id)</rasd:ElementName><rasd:InstanceID>\(id)</rasd:InstanceID>"
            + "\(fields)<rasd:ResourceType>\(type)</rasd:ResourceType></Item>\n"
    }

    static let disk = """
        <Disk ovf:capacity="8" ovf:capacityAllocationUnits="byte * 2^30" ovf:diskId="vmdisk1" ovf:fileRef="file1" \
        ovf:format="http://www.vmware.com/interfaces/specifications/vmdk.html#streamOptimized"/>
        """

    /// A minimal VM whose parts a test replaces.
    static func small(
        file: String = "<File ovf:href=\"web-disk1.vmdk\" ovf:id=\"file1\"/>", disk: String = disk,
        cpu: String = "2", memory: String = "4096", memoryUnits: String = "byte * 2^20",
        host: String = "ovf:/disk/vmdisk1", diskParent: String = "3",
        nics: String = "", items: String = "", settings: String = "", sections: String = ""
    ) -> String {
        head + """
            <References>\(file)</References>
            <DiskSection><Info>disks</Info>\(disk)</DiskSection>
            <NetworkSection><Info>networks</Info><Network ovf:name="VM Network"/></NetworkSection>
            <VirtualSystem ovf:id="web"><Info>A virtual machine</Info><Name>web</Name>
            <OperatingSystemSection ovf:id="94" vmw:osType="ubuntu64Guest"><Info>os</Info></OperatingSystemSection>
            <VirtualHardwareSection><Info>hw</Info>
            <System><vssd:VirtualSystemType>vmx-19</vssd:VirtualSystemType></System>
            \(item(1, 3, "<rasd:VirtualQuantity>\(cpu)</rasd:VirtualQuantity>"))
            \(item(2, 4, "<rasd:AllocationUnits>\(memoryUnits)</rasd:AllocationUnits><rasd:VirtualQuantity>\(memory)</rasd:VirtualQuantity>"))
            \(item(3, 6, "<rasd:Address>0</rasd:Address><rasd:ResourceSubType>VirtualSCSI</rasd:ResourceSubType>"))
            \(item(4, 17, "<rasd:AddressOnParent>0</rasd:AddressOnParent><rasd:HostResource>\(host)</rasd:HostResource><rasd:Parent>\(diskParent)</rasd:Parent>"))
            \(nics)\(items)\(settings)
            </VirtualHardwareSection>\(sections)
            </VirtualSystem></Envelope>
            """
    }

    static let vcenter =
        head + """
            <!-- exported by a vCenter -->
            <References>
              <File ovf:id="file1" ovf:href="gpu%20node-1.vmdk"/>
              <File ovf:id="file2" ovf:href="gpu node-2.vmdk"/>
            </References>
            <DiskSection>
              <Info>Virtual disk information</Info>
              <Disk ovf:capacity="16" ovf:capacityAllocationUnits="byte * 2^30" ovf:diskId="vmdisk1" ovf:fileRef="file1" \
            ovf:format="http://www.vmware.com/interfaces/specifications/vmdk.html#streamOptimized" ovf:populatedSize="1"/>
              <Disk ovf:capacity="1" ovf:capacityAllocationUnits="GB" ovf:diskId="vmdisk2" ovf:fileRef="file2" \
            ovf:format="http://www.vmware.com/interfaces/specifications/vmdk.html#streamOptimized"/>
            </DiskSection>
            <NetworkSection><Info>nets</Info><Network ovf:name="prod &amp; test"><Description>n</Description></Network>
            <Network ovf:name="storage"/></NetworkSection>
            <VirtualSystem ovf:id="gpu node">
              <Info>A virtual machine</Info>
              <Name>gpu node</Name>
              <OperatingSystemSection ovf:id="94" vmw:osType="ubuntu64Guest">
                <Info>os</Info><Description>Ubuntu Linux (64-bit)</Description></OperatingSystemSection>
              <AnnotationSection><Info>a</Info><Annotation>first line
            second line</Annotation></AnnotationSection>
              <VirtualHardwareSection>
                <Info>Virtual hardware requirements</Info>
                <System><vssd:ElementName>Virtual Hardware Family</vssd:ElementName><vssd:InstanceID>0</vssd:InstanceID>
                  <vssd:VirtualSystemIdentifier>gpu node</vssd:VirtualSystemIdentifier>
                  <vssd:VirtualSystemType>vmx-20</vssd:VirtualSystemType></System>
                <Item><rasd:AllocationUnits>hertz * 10^6</rasd:AllocationUnits><rasd:ElementName>8 virtual CPU(s)</rasd:ElementName>
                  <rasd:InstanceID>1</rasd:InstanceID><rasd:Reservation>2000</rasd:Reservation><rasd:ResourceType>3</rasd:ResourceType>
                  <rasd:VirtualQuantity>8</rasd:VirtualQuantity><rasd:Weight>8000</rasd:Weight>
                  <vmw:CoresPerSocket ovf:required="false">4</vmw:CoresPerSocket></Item>
                <Item><rasd:AllocationUnits>byte * 2^20</rasd:AllocationUnits><rasd:ElementName>64 GB</rasd:ElementName>
                  <rasd:InstanceID>2</rasd:InstanceID><rasd:Reservation>65536</rasd:Reservation><rasd:ResourceType>4</rasd:ResourceType>
                  <rasd:VirtualQuantity>65536</rasd:VirtualQuantity></Item>
                <Item><rasd:Address>0</rasd:Address><rasd:ElementName>SCSI Controller 0</rasd:ElementName><rasd:InstanceID>3</rasd:InstanceID>
                  <rasd:ResourceSubType>VirtualSCSI</rasd:ResourceSubType><rasd:ResourceType>6</rasd:ResourceType></Item>
                <Item><rasd:Address>0</rasd:Address><rasd:ElementName>NVMe Controller 0</rasd:ElementName><rasd:InstanceID>4</rasd:InstanceID>
                  <rasd:ResourceSubType>vmware.nvme.controller</rasd:ResourceSubType><rasd:ResourceType>20</rasd:ResourceType></Item>
                <Item><rasd:AddressOnParent>0</rasd:AddressOnParent><rasd:ElementName>Hard disk 2</rasd:ElementName>
                  <rasd:HostResource>ovf:/disk/vmdisk2</rasd:HostResource><rasd:InstanceID>11</rasd:InstanceID>
                  <rasd:Parent>4</rasd:Parent><rasd:ResourceType>17</rasd:ResourceType></Item>
                <Item><rasd:AddressOnParent>1</rasd:AddressOnParent><rasd:ElementName>Hard disk 1</rasd:ElementName>
                  <rasd:HostResource>ovf:/disk/vmdisk1</rasd:HostResource><rasd:InstanceID>10</rasd:InstanceID>
                  <rasd:Parent>3</rasd:Parent><rasd:ResourceType>17</rasd:ResourceType>
                  <vmw:Config ovf:required="false" vmw:key="backing.diskMode" vmw:value="independent_persistent"/></Item>
                <Item><rasd:Address>00-50-56-9A-11-22</rasd:Address><rasd:AddressOnParent>7</rasd:AddressOnParent>
                  <rasd:AutomaticAllocation>true</rasd:AutomaticAllocation><rasd:Connection>prod &amp; test</rasd:Connection>
                  <rasd:ElementName>Network adapter 1</rasd:ElementName><rasd:InstanceID>12</rasd:InstanceID>
                  <rasd:ResourceSubType>VmxNet3</rasd:ResourceSubType><rasd:ResourceType>10</rasd:ResourceType></Item>
                <Item ovf:required="false"><rasd:AutomaticAllocation>false</rasd:AutomaticAllocation>
                  <rasd:ElementName>CD/DVD drive 1</rasd:ElementName><rasd:InstanceID>13</rasd:InstanceID>
                  <rasd:ResourceSubType>vmware.cdrom.remotepassthrough</rasd:ResourceSubType><rasd:ResourceType>15</rasd:ResourceType></Item>
                <Item ovf:required="false"><rasd:ElementName>Video card</rasd:ElementName><rasd:InstanceID>14</rasd:InstanceID>
                  <rasd:ResourceType>24</rasd:ResourceType>
                  <vmw:Config ovf:required="false" vmw:key="videoRamSizeInKB" vmw:value="16384"/></Item>
                <Item ovf:required="false"><rasd:ElementName>VMCI device</rasd:ElementName><rasd:InstanceID>15</rasd:InstanceID>
                  <rasd:ResourceSubType>vmware.vmci</rasd:ResourceSubType><rasd:ResourceType>1</rasd:ResourceType></Item>
                <Item ovf:required="false"><rasd:ElementName>Virtual TPM</rasd:ElementName><rasd:InstanceID>16</rasd:InstanceID>
                  <rasd:ResourceSubType>vmware.vtpm</rasd:ResourceSubType><rasd:ResourceType>1</rasd:ResourceType></Item>
                <vmw:Config ovf:required="false" vmw:key="firmware" vmw:value="efi"/>
                <vmw:Config ovf:required="false" vmw:key="uefi.secureBoot.enabled" vmw:value="true"/>
                <vmw:Config ovf:required="false" vmw:key="cpuHotAddEnabled" vmw:value="true"/>
                <vmw:Config ovf:required="false" vmw:key="memoryHotAddEnabled" vmw:value="false"/>
                <vmw:Config ovf:required="false" vmw:key="nestedHVEnabled" vmw:value="true"/>
                <vmw:ExtraConfig ovf:required="false" vmw:key="pciPassthru.use64bitMMIO" vmw:value="TRUE"/>
                <vmw:ExtraConfig ovf:required="false" vmw:key="pciPassthru0.present" vmw:value="TRUE"/>
                <vmw:ExtraConfig ovf:required="false" vmw:key="pciPassthru0.vgpu" vmw:value="grid_a100-40c"/>
                <vmw:ExtraConfig ovf:required="false" vmw:key="pciPassthru0.cfg.enable_uvm" vmw:value="1"/>
                <vmw:ExtraConfig ovf:required="false" vmw:key="guestinfo.password" vmw:value="secret"/>
                <vmw:ExtraConfig ovf:required="false" vmw:key="hypervisor.cpuid.v0" vmw:value="FALSE"/>
              </VirtualHardwareSection>
            </VirtualSystem>
            </Envelope>
            """

    /// VirtualBox: units by name, an IDE disk after a SATA one, its own machine section, no VMware vocabulary.
    static let virtualBox = """
        <?xml version="1.0"?>
        <o:Envelope ovf:version="1.0" xmlns:o="http://schemas.dmtf.org/ovf/envelope/1" \
        xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1" \
        xmlns:r="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_ResourceAllocationSettingData" \
        xmlns:v="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_VirtualSystemSettingData" \
        xmlns:vbox="http://www.virtualbox.org/ovf/machine">
        <o:References><o:File ovf:id="file1" ovf:href="box-disk001.vmdk"/></o:References>
        <o:DiskSection><o:Info>List of the virtual disks</o:Info><o:Disk ovf:capacity="1073741824" ovf:diskId="vmdisk1" \
        ovf:fileRef="file1" ovf:format="http://www.vmware.com/interfaces/specifications/vmdk.html#streamOptimized" \
        vbox:uuid="9b7f1f8e-0000-4000-8000-000000000001"/></o:DiskSection>
        <o:NetworkSection><o:Info>n</o:Info><o:Network ovf:name="NAT"/></o:NetworkSection>
        <o:VirtualSystem ovf:id="box"><o:Info>A virtual machine</o:Info>
        <o:OperatingSystemSection ovf:id="96"><o:Info>os</o:Info><o:Description>Debian_64</o:Description>
        <vbox:OSType ovf:required="false">Debian_64</vbox:OSType></o:OperatingSystemSection>
        <o:VirtualHardwareSection><o:Info>hw</o:Info>
        <o:System><v:ElementName>Virtual Hardware Family</v:ElementName><v:InstanceID>0</v:InstanceID>
        <v:VirtualSystemIdentifier>box</v:VirtualSystemIdentifier><v:VirtualSystemType>virtualbox-2.2</v:VirtualSystemType></o:System>
        <o:Item><r:Caption>1 virtual CPU</r:Caption><r:InstanceID>1</r:InstanceID><r:ResourceType>3</r:ResourceType><r:VirtualQuantity>1</r:VirtualQuantity></o:Item>
        <o:Item><r:AllocationUnits>MegaBytes</r:AllocationUnits><r:InstanceID>2</r:InstanceID><r:ResourceType>4</r:ResourceType><r:VirtualQuantity>2048</r:VirtualQuantity></o:Item>
        <o:Item><r:Address>0</r:Address><r:InstanceID>3</r:InstanceID><r:ResourceSubType>PIIX4</r:ResourceSubType><r:ResourceType>5</r:ResourceType></o:Item>
        <o:Item><r:Address>0</r:Address><r:InstanceID>5</r:InstanceID><r:ResourceSubType>AHCI</r:ResourceSubType><r:ResourceType>20</r:ResourceType></o:Item>
        <o:Item><r:Caption>sound</r:Caption><r:InstanceID>6</r:InstanceID><r:ResourceSubType>ensoniq1371</r:ResourceSubType><r:ResourceType>35</r:ResourceType></o:Item>
        <o:Item><r:AddressOnParent>0</r:AddressOnParent><r:Caption>disk1</r:Caption><r:HostResource>/disk/vmdisk1</r:HostResource>
        <r:InstanceID>7</r:InstanceID><r:Parent>5</r:Parent><r:ResourceType>17</r:ResourceType></o:Item>
        <o:Item><r:AutomaticAllocation>true</r:AutomaticAllocation><r:Caption>Ethernet adapter on 'NAT'</r:Caption>
        <r:Connection>NAT</r:Connection><r:InstanceID>8</r:InstanceID><r:ResourceSubType>E1000</r:ResourceSubType><r:ResourceType>10</r:ResourceType></o:Item>
        </o:VirtualHardwareSection>
        <vbox:Machine ovf:required="false" version="1.19-linux" uuid="{f00}" name="box"><ovf:Info>c</ovf:Info></vbox:Machine>
        </o:VirtualSystem></o:Envelope>
        """
}
