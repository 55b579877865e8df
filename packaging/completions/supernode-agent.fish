# Print an optspec for argparse to handle cmd's options that are independent of any subcommand.
function __fish_supernode_agent_global_optspecs
    string join \n settings= h/help
end

function __fish_supernode_agent_needs_command
    # Figure out if the current invocation already has a command.
    set -l cmd (commandline -opc)
    set -e cmd[1]
    argparse -s (__fish_supernode_agent_global_optspecs) -- $cmd 2>/dev/null
    or return
    if set -q argv[1]
        # Also print the command, so this can be used to figure out what it is.
        echo $argv[1]
        return 1
    end
    return 0
end

function __fish_supernode_agent_using_subcommand
    set -l cmd (__fish_supernode_agent_needs_command)
    test -z "$cmd"
    and return 1
    contains -- $cmd[1] $argv
end

complete -c supernode-agent -n "__fish_supernode_agent_needs_command" -l settings -d 'Settings of this machine, instead of /etc/supernode-agent/agent.toml' -r -F
complete -c supernode-agent -n "__fish_supernode_agent_needs_command" -s h -l help -d 'Print help'
complete -c supernode-agent -n "__fish_supernode_agent_needs_command" -f -a "run" -d 'Run the node: the daemon that systemd starts'
complete -c supernode-agent -n "__fish_supernode_agent_needs_command" -f -a "plan" -d 'Show what would be done: configuration, facts, verdict, container; touches nothing'
complete -c supernode-agent -n "__fish_supernode_agent_needs_command" -f -a "gpu" -d 'Show the GPU facts and the verdict'
complete -c supernode-agent -n "__fish_supernode_agent_needs_command" -f -a "check" -d 'Find out what is wrong and how to mend it: each check is OK, WARNING or ERROR, with a fix'
complete -c supernode-agent -n "__fish_supernode_agent_needs_command" -f -a "status" -d 'Show what runs, on which device, since when and why'
complete -c supernode-agent -n "__fish_supernode_agent_needs_command" -f -a "configure-runtime" -d 'Put the nvidia runtime into Docker\'s daemon.json, and nothing else'
complete -c supernode-agent -n "__fish_supernode_agent_needs_command" -f -a "variables" -d 'Show the context variables'
complete -c supernode-agent -n "__fish_supernode_agent_needs_command" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c supernode-agent -n "__fish_supernode_agent_using_subcommand run" -l settings -d 'Settings of this machine, instead of /etc/supernode-agent/agent.toml' -r -F
complete -c supernode-agent -n "__fish_supernode_agent_using_subcommand run" -s h -l help -d 'Print help'
complete -c supernode-agent -n "__fish_supernode_agent_using_subcommand plan" -l settings -d 'Settings of this machine, instead of /etc/supernode-agent/agent.toml' -r -F
complete -c supernode-agent -n "__fish_supernode_agent_using_subcommand plan" -l json -d 'Print JSON'
complete -c supernode-agent -n "__fish_supernode_agent_using_subcommand plan" -s h -l help -d 'Print help'
complete -c supernode-agent -n "__fish_supernode_agent_using_subcommand gpu" -l settings -d 'Settings of this machine, instead of /etc/supernode-agent/agent.toml' -r -F
complete -c supernode-agent -n "__fish_supernode_agent_using_subcommand gpu" -l json -d 'Print JSON'
complete -c supernode-agent -n "__fish_supernode_agent_using_subcommand gpu" -s h -l help -d 'Print help'
complete -c supernode-agent -n "__fish_supernode_agent_using_subcommand check; and not __fish_seen_subcommand_from vm host template help" -l settings -d 'Settings of this machine, instead of /etc/supernode-agent/agent.toml' -r -F
complete -c supernode-agent -n "__fish_supernode_agent_using_subcommand check; and not __fish_seen_subcommand_from vm host template help" -s h -l help -d 'Print help'
complete -c supernode-agent -n "__fish_supernode_agent_using_subcommand check; and not __fish_seen_subcommand_from vm host template help" -f -a "vm" -d 'This VM: GPU, driver, Docker, image, and what its template could give it'
complete -c supernode-agent -n "__fish_supernode_agent_using_subcommand check; and not __fish_seen_subcommand_from vm host template help" -f -a "host" -d 'This KVM host: IOMMU, vfio, and what OpenNebula is told of its GPUs'
complete -c supernode-agent -n "__fish_supernode_agent_using_subcommand check; and not __fish_seen_subcommand_from vm host template help" -f -a "template" -d 'An OpenNebula template: what GPU passthrough and the node need'
complete -c supernode-agent -n "__fish_supernode_agent_using_subcommand check; and not __fish_seen_subcommand_from vm host template help" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c supernode-agent -n "__fish_supernode_agent_using_subcommand check; and __fish_seen_subcommand_from vm" -l root -d 'Check the machine whose root folder is DIR, and look at nothing outside of it' -r -F
complete -c supernode-agent -n "__fish_supernode_agent_using_subcommand check; and __fish_seen_subcommand_from vm" -l settings -d 'Settings of this machine, instead of /etc/supernode-agent/agent.toml' -r -F
complete -c supernode-agent -n "__fish_supernode_agent_using_subcommand check; and __fish_seen_subcommand_from vm" -l json -d 'Print JSON'
complete -c supernode-agent -n "__fish_supernode_agent_using_subcommand check; and __fish_seen_subcommand_from vm" -s h -l help -d 'Print help'
complete -c supernode-agent -n "__fish_supernode_agent_using_subcommand check; and __fish_seen_subcommand_from host" -l root -d 'Check the machine whose root folder is DIR, and look at nothing outside of it' -r -F
complete -c supernode-agent -n "__fish_supernode_agent_using_subcommand check; and __fish_seen_subcommand_from host" -l settings -d 'Settings of this machine, instead of /etc/supernode-agent/agent.toml' -r -F
complete -c supernode-agent -n "__fish_supernode_agent_using_subcommand check; and __fish_seen_subcommand_from host" -l json -d 'Print JSON'
complete -c supernode-agent -n "__fish_supernode_agent_using_subcommand check; and __fish_seen_subcommand_from host" -s h -l help -d 'Print help'
complete -c supernode-agent -n "__fish_supernode_agent_using_subcommand check; and __fish_seen_subcommand_from template" -l settings -d 'Settings of this machine, instead of /etc/supernode-agent/agent.toml' -r -F
complete -c supernode-agent -n "__fish_supernode_agent_using_subcommand check; and __fish_seen_subcommand_from template" -l json -d 'Print JSON'
complete -c supernode-agent -n "__fish_supernode_agent_using_subcommand check; and __fish_seen_subcommand_from template" -s h -l help -d 'Print help'
complete -c supernode-agent -n "__fish_supernode_agent_using_subcommand check; and __fish_seen_subcommand_from help" -f -a "vm" -d 'This VM: GPU, driver, Docker, image, and what its template could give it'
complete -c supernode-agent -n "__fish_supernode_agent_using_subcommand check; and __fish_seen_subcommand_from help" -f -a "host" -d 'This KVM host: IOMMU, vfio, and what OpenNebula is told of its GPUs'
complete -c supernode-agent -n "__fish_supernode_agent_using_subcommand check; and __fish_seen_subcommand_from help" -f -a "template" -d 'An OpenNebula template: what GPU passthrough and the node need'
complete -c supernode-agent -n "__fish_supernode_agent_using_subcommand check; and __fish_seen_subcommand_from help" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c supernode-agent -n "__fish_supernode_agent_using_subcommand status" -l settings -d 'Settings of this machine, instead of /etc/supernode-agent/agent.toml' -r -F
complete -c supernode-agent -n "__fish_supernode_agent_using_subcommand status" -l json -d 'Print JSON'
complete -c supernode-agent -n "__fish_supernode_agent_using_subcommand status" -l ready -d 'Exit 0 only while the container runs, and print nothing then'
complete -c supernode-agent -n "__fish_supernode_agent_using_subcommand status" -l watch -d 'Show it until Ctrl-C: on a terminal in place, elsewhere each change'
complete -c supernode-agent -n "__fish_supernode_agent_using_subcommand status" -s h -l help -d 'Print help'
complete -c supernode-agent -n "__fish_supernode_agent_using_subcommand configure-runtime" -l settings -d 'Settings of this machine, instead of /etc/supernode-agent/agent.toml' -r -F
complete -c supernode-agent -n "__fish_supernode_agent_using_subcommand configure-runtime" -s h -l help -d 'Print help'
complete -c supernode-agent -n "__fish_supernode_agent_using_subcommand variables" -l format -d 'How the table looks' -r -f -a "table\t'For a terminal'
markdown\t'For a document'
user-inputs\t'The CONTEXT and the USER_INPUTS of an OpenNebula template'"
complete -c supernode-agent -n "__fish_supernode_agent_using_subcommand variables" -l settings -d 'Settings of this machine, instead of /etc/supernode-agent/agent.toml' -r -F
complete -c supernode-agent -n "__fish_supernode_agent_using_subcommand variables" -l json -d 'Print JSON'
complete -c supernode-agent -n "__fish_supernode_agent_using_subcommand variables" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c supernode-agent -n "__fish_supernode_agent_using_subcommand help; and not __fish_seen_subcommand_from run plan gpu check status configure-runtime variables help" -f -a "run" -d 'Run the node: the daemon that systemd starts'
complete -c supernode-agent -n "__fish_supernode_agent_using_subcommand help; and not __fish_seen_subcommand_from run plan gpu check status configure-runtime variables help" -f -a "plan" -d 'Show what would be done: configuration, facts, verdict, container; touches nothing'
complete -c supernode-agent -n "__fish_supernode_agent_using_subcommand help; and not __fish_seen_subcommand_from run plan gpu check status configure-runtime variables help" -f -a "gpu" -d 'Show the GPU facts and the verdict'
complete -c supernode-agent -n "__fish_supernode_agent_using_subcommand help; and not __fish_seen_subcommand_from run plan gpu check status configure-runtime variables help" -f -a "check" -d 'Find out what is wrong and how to mend it: each check is OK, WARNING or ERROR, with a fix'
complete -c supernode-agent -n "__fish_supernode_agent_using_subcommand help; and not __fish_seen_subcommand_from run plan gpu check status configure-runtime variables help" -f -a "status" -d 'Show what runs, on which device, since when and why'
complete -c supernode-agent -n "__fish_supernode_agent_using_subcommand help; and not __fish_seen_subcommand_from run plan gpu check status configure-runtime variables help" -f -a "configure-runtime" -d 'Put the nvidia runtime into Docker\'s daemon.json, and nothing else'
complete -c supernode-agent -n "__fish_supernode_agent_using_subcommand help; and not __fish_seen_subcommand_from run plan gpu check status configure-runtime variables help" -f -a "variables" -d 'Show the context variables'
complete -c supernode-agent -n "__fish_supernode_agent_using_subcommand help; and not __fish_seen_subcommand_from run plan gpu check status configure-runtime variables help" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c supernode-agent -n "__fish_supernode_agent_using_subcommand help; and __fish_seen_subcommand_from check" -f -a "vm" -d 'This VM: GPU, driver, Docker, image, and what its template could give it'
complete -c supernode-agent -n "__fish_supernode_agent_using_subcommand help; and __fish_seen_subcommand_from check" -f -a "host" -d 'This KVM host: IOMMU, vfio, and what OpenNebula is told of its GPUs'
complete -c supernode-agent -n "__fish_supernode_agent_using_subcommand help; and __fish_seen_subcommand_from check" -f -a "template" -d 'An OpenNebula template: what GPU passthrough and the node need'
